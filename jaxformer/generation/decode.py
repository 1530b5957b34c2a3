"""Writing sequences token by token: one loop with a cache, around any next-token model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.generation.samplers import Sample
from jaxformer.typing import Array, Bool, Float, Int, Key

Cache = Any
Decode = Callable[[Int[Array, "B T"], Cache], tuple[Float[Array, "B T V"], Cache]]


def generate(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    sample: Sample,
    key: Key[Array, ""],
    prompt_lengths: Int[Array, "B"] | None = None,
    prefix: int | None = None,
    stop: int | None = None,
    pad: int = 0,
) -> Int[Array, "B P+{steps}"]:
    """Continues every prompt by up to `steps` tokens.

    Each row of the result is the row's own prompt, then its new tokens, then `pad` to the end:
    `steps` new ones, or fewer where `stop` was drawn, which is the row's last. A `stop` inside a
    prompt ends nothing.

    The first `prefix` columns go through the model in one call, the rest one token at a time,
    all rows at the same position: a row still inside its prompt takes the prompt's token, the
    others draw theirs. The token at position `t` is drawn with `fold_in(key, t)`, so the result
    repeats and depends on `prefix` in speed only. The loop ends as soon as every row has.

    A pure function, traced anew on each call, so compile it with what changes as arguments:

        @jax.jit
        def write(params, cache, prompt, key):
            decode = lambda tokens, cache: model.apply(params, tokens, cache)
            return generate(decode, cache, prompt, steps=195, sample=sampler(), key=key)

    Args:
        decode: Takes the next T tokens of every row and the cache of all before them; returns
            the logits after each and the new cache, which alone knows the position.
        cache: An empty cache with room for P + `steps` - 1 tokens.
        prompt: Tokens, padded on the right with anything; P is 1 or more.
        steps: New tokens a row, 0 or more.
        sample: From `samplers`, or any function of a key and the logits of the next token.
        key: A typed key.
        prompt_lengths: Tokens of each row's prompt, from 1 to P; by default all have P.
        prefix: Columns that are inside every row's prompt: at most the smallest length, which
            is checked where the lengths are known at tracing. By default P if all prompts have
            that length, and 1 if not, since a compiled shape cannot depend on their values.
        stop: Token after which a row is finished.
        pad: Token that fills finished rows; the model sees it there, so it must be a token.

    Returns:
        Tokens of the dtype of `prompt`.

    Raises:
        ValueError: If P, `steps`, `prefix` or a known prompt length is outside its range.
    """
    batch, width = prompt.shape
    lengths = jnp.full(batch, width) if prompt_lengths is None else jnp.asarray(prompt_lengths)
    if prefix is None:
        prefix = width if prompt_lengths is None else 1
    _check(width, steps, prefix, lengths)
    columns = jnp.arange(width + steps)
    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))
    tokens = jnp.where(columns[None] < lengths[:, None], tokens, pad)

    def choose(
        position: Int[Array, ""],
        logits: Float[Array, "B V"],
        tokens: Int[Array, "B L"],
        done: Bool[Array, "B"],
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B"]]:
        drawn = sample(jax.random.fold_in(key, position), logits).astype(tokens.dtype)
        new = (position >= lengths) & ~done
        token = jnp.where(new, drawn, tokens[:, position])
        if stop is not None:
            done |= new & (token == stop)
        done |= position + 1 >= lengths + steps
        return tokens.at[:, position].set(token), done

    def advance(state: tuple) -> tuple:
        position, cache, tokens, done = state
        last = jax.lax.dynamic_slice_in_dim(tokens, position - 1, 1, axis=1)
        logits, cache = decode(last, cache)
        return position + 1, cache, *choose(position, logits[:, -1], tokens, done)

    def unfinished(state: tuple) -> Bool[Array, ""]:
        position, _, _, done = state
        return (position < width + steps) & ~done.all()

    if steps == 0:
        return tokens
    logits, cache = decode(tokens[:, :prefix], cache)
    tokens, done = choose(jnp.asarray(prefix), logits[:, -1], tokens, jnp.zeros(batch, bool))
    return jax.lax.while_loop(unfinished, advance, (jnp.asarray(prefix + 1), cache, tokens, done))[
        2
    ]


def _check(width: int, steps: int, prefix: int, lengths: Int[Array, "B"]) -> None:
    if width < 1:
        raise ValueError(f"generate needs a prompt of at least one token, got P={width}.")
    if steps < 0:
        raise ValueError(f"generate needs steps >= 0, got steps={steps}.")
    if not 1 <= prefix <= width:
        raise ValueError(f"prefix must lie between 1 and P={width}, got prefix={prefix}.")
    try:
        known = np.asarray(lengths)
    except jax.errors.TracerArrayConversionError:
        return
    for row, length in enumerate(known):
        if not prefix <= length <= width:
            raise ValueError(
                f"prompt_lengths[{row}]={length} is not between prefix={prefix} and P={width}."
            )
