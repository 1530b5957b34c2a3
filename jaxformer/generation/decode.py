"""Writing sequences token by token: one loop with a cache, around any next-token model."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxformer.generation import loop, stops
from jaxformer.generation.loop import Cache, Decode
from jaxformer.generation.samplers import Sample
from jaxformer.generation.stops import Stop
from jaxformer.typing import Array, Float, Int, Key


class Completion(NamedTuple):
    """Prompts and what was written after them.

    Attributes:
        tokens: Each row's own prompt, its new tokens, then `pad` to the end.
        lengths: Tokens of each row, prompt and new ones; the stop that ended it is among them.
        log_probs: Of each new token, under the model's own distribution, before any filter; 0 past
            the row's end. In nats.
        cache: Of prompts of given lengths, it holds all of each row but its last new token.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    log_probs: Float[Array, "B N"]
    cache: Cache


def complete(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    sample: Sample,
    key: Key[Array, ""] | Key[Array, "B"],
    prompt_lengths: Int[Array, "B"] | None = None,
    limits: Int[Array, "B"] | None = None,
    stop: Stop = None,
    pad: int = 0,
) -> Completion:
    """Continues every prompt by up to `steps` tokens.

    All prompts go through the model in one call, then every row continues at its own place: the
    model is called `steps` times, or fewer if every row ends before. A row ends when what was
    written, without the prompt, ends with a stop, or at its limit.

    With one key, the n-th new token of all rows is drawn with `fold_in(key, P + n)`, n from 0:
    the key of a token is its position where all prompts have P tokens. With a key for each row, a
    row's token at position t is drawn with `fold_in(key[row], t)` from its logits alone, so a row
    depends neither on the others in its batch nor on the padding.

    A pure function, traced anew on each call, so compile it with what changes as arguments; other
    lengths, limits, keys or prompts of the same shape then compile nothing:

        @jax.jit
        def write(params, cache, prompt, lengths, limits, key):
            decode = functools.partial(model.apply, params)
            return complete(decode, cache, prompt, steps=256, sample=sampler(top_p=0.9), key=key,
                            prompt_lengths=lengths, limits=limits, stop=(end, (newline, newline)))

    Args:
        decode: The model, `decode(tokens, cache, counts)` as in `generation.loop`. Without
            `prompt_lengths` it is called without `counts`, and rows that have ended are fed `pad`.
        cache: Empty, or of what came before, with room for P + `steps` - 1 more tokens.
        prompt: Tokens, padded on the right with anything; P is 1 or more.
        steps: The most new tokens a row can have, 0 or more.
        sample: From `samplers`, or any function of a key and the logits of the next token.
        key: A typed key, or one for each row.
        prompt_lengths: Tokens of each row's prompt, from 1 to P; by default all have P.
        limits: New tokens that each row may have, if fewer than `steps`.
        stop: Tokens, or sequences of tokens, as `stops.sequences` reads them. They are kept.
        pad: Token that fills up rows.

    Returns:
        Tokens of the dtype of `prompt`, P + `steps` a row, and what is known about them.

    Raises:
        ValueError: If P or `steps`, a known length or limit is outside its range, a stop is empty,
            or a prompt is known not to fit in the cache.
    """
    lengths, left = loop.prepare((cache,), prompt, prompt_lengths, steps, limits)
    rules = loop.Rules(sample, stops.sequences(stop), pad, ragged=prompt_lengths is not None)
    if steps == 0:
        nothing = jnp.zeros((prompt.shape[0], 0), prompt.dtype)
        tokens = loop.join(prompt, lengths, nothing, left, pad)
        return Completion(tokens, lengths, nothing.astype(jnp.float32), cache)
    state, token, score = loop.start(decode, cache, prompt, lengths, left, key, rules)
    state, tokens, scores = loop.run(decode, state, steps - 1, rules)
    new = jnp.concatenate([token[:, None], tokens], axis=1)
    return Completion(
        loop.join(prompt, lengths, new, state.drawn, pad),
        lengths + state.drawn,
        jnp.concatenate([score[:, None], scores], axis=1),
        state.cache,
    )


def generate(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    sample: Sample,
    key: Key[Array, ""] | Key[Array, "B"],
    prompt_lengths: Int[Array, "B"] | None = None,
    limits: Int[Array, "B"] | None = None,
    stop: Stop = None,
    pad: int = 0,
) -> Int[Array, "B P+{steps}"]:
    """Returns the tokens of `complete`, alone."""
    return complete(
        decode,
        cache,
        prompt,
        steps=steps,
        sample=sample,
        key=key,
        prompt_lengths=prompt_lengths,
        limits=limits,
        stop=stop,
        pad=pad,
    ).tokens
