"""Beam search: the likeliest texts that a search of fixed width finds."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.generation import loop, stops
from jaxformer.generation.loop import Cache, Decode, RowCache
from jaxformer.generation.stops import Stop
from jaxformer.typing import Array, Bool, DTypeLike, Float, Int


class Beams(NamedTuple):
    """The best texts of each row, the best first.

    Attributes:
        tokens: The row's own prompt, its new tokens, then `pad` to the end.
        lengths: Tokens of each text, prompt and new ones; the stop that ended it is among them.
        scores: Sum of the new tokens' log-probabilities over their number to the power of the
            length penalty; -inf where there are fewer texts than beams.
    """

    tokens: Int[Array, "B K L"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]


class _Texts(NamedTuple):
    """New tokens after as many -1 as the longest stop has tokens; how many; their scores."""

    tokens: Int[Array, "B K L"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]

    def best(self, count: int) -> tuple["_Texts", Int[Array, "B K"]]:
        """The `count` best, and where they were."""
        scores, order = jax.lax.top_k(self.scores, count)
        tokens = jnp.take_along_axis(self.tokens, order[..., None], axis=1)
        lengths = jnp.take_along_axis(self.lengths, order, axis=1)
        return _Texts(tokens, lengths, scores), order


class _Search(NamedTuple):
    """The cache of all live texts, B · K rows; `open` is whether a live text may still win."""

    cache: RowCache
    step: Int[Array, ""]
    live: _Texts
    done: _Texts
    open: Bool[Array, "B"]

    @classmethod
    def begin(
        cls, cache: RowCache, shape: tuple[int, int], room: int, dtype: DTypeLike
    ) -> "_Search":
        """All K live texts are the prompt, so that only one may be continued."""
        batch, num_beams = shape
        nothing = _Texts(
            jnp.full((*shape, room), -1, dtype),
            jnp.zeros(shape, jnp.int32),
            jnp.full(shape, -jnp.inf),
        )
        return cls(
            cache.select(jnp.repeat(jnp.arange(batch), num_beams)),
            jnp.zeros((), jnp.int32),
            live=nothing._replace(scores=nothing.scores.at[:, 0].set(0)),
            done=nothing,
            open=jnp.ones(batch, bool),
        )

    def going(self, early_stopping: bool | str) -> Bool[Array, "B"]:
        """In which rows a text may still join those that are done."""
        if early_stopping is True:
            return self.open & jnp.isneginf(self.done.scores).any(1)
        return self.open


def beam_search(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    prompt_lengths: Int[Array, "B"] | None = None,
    stop: Stop = None,
    pad: int = 0,
) -> Beams:
    """Searches the best continuations of every prompt with `num_beams` live texts.

    Each step continues the live texts by every token and looks at the best of all: those of the
    first `num_beams` that end with a stop are done, and the best `num_beams` that do not live on.
    Texts that have `steps` new tokens are done. The search, its scores and its three ways to stop
    are those of Hugging Face transformers; the rows of a batch do not affect each other.

    A pure function for `jit`, like `decode.complete`; the prompts are read once, not once a beam.

    Args:
        decode: The model, `decode(tokens, cache, counts)` as in `generation.loop`.
        cache: A `loop.RowCache` of B rows with room for P + `steps` - 1 more tokens.
        prompt: Tokens, padded on the right with anything; P is 1 or more.
        steps: The most new tokens of a text, 1 or more.
        num_beams: K, live texts a row and texts returned.
        length_penalty: Power of the length that a sum of log-probabilities is divided by; above 0
            favours long texts, below 0 short ones.
        early_stopping: When a row with K texts that are done is finished. True: at once. False:
            when its best live text, if it ended now, would be no better than the worst of them.
            "never": when it could be no better even at the most favourable length.
        prompt_lengths: Tokens of each row's prompt, from 1 to P; by default all have P.
        stop: Tokens, or sequences of tokens, as `stops.sequences` reads them. They are kept.
        pad: Token that fills up texts.

    Raises:
        ValueError: If `steps` or `num_beams` is below 1, P or a known length is outside its range,
            a stop is empty, there are no more tokens than stops, or a prompt is known not to fit
            in the cache.

    References:
        Graves 2012, "Sequence Transduction with Recurrent Neural Networks", section 2.7 (search).
        https://arxiv.org/abs/1211.3711
        Wu et al. 2016, section 7 (length; they divide by ((5 + n) / 6)^α, we and transformers by
        n^α). https://arxiv.org/abs/1609.08144
    """
    if num_beams < 1:
        raise ValueError(f"beam search needs num_beams >= 1, got {num_beams=}.")
    if steps < 1:
        raise ValueError(f"beam search needs steps >= 1, got {steps=}.")
    lengths, _ = loop.prepare((cache,), prompt, prompt_lengths, steps, None)
    ends = stops.sequences(stop)
    ragged = prompt_lengths is not None
    logits, cache = loop.prefill(decode, cache, prompt, lengths, ragged=ragged)
    batch, vocab_size = logits.shape
    if vocab_size <= len(ends):
        raise ValueError(f"V={vocab_size} tokens are not more than the stops {ends}.")
    choose = _chooser(num_beams, steps, length_penalty, early_stopping, ends)
    shape, margin = (batch, num_beams), stops.longest(ends)

    def advance(search: _Search) -> _Search:
        place = margin + search.step - 1
        last = jax.lax.dynamic_index_in_dim(search.live.tokens, place, axis=2, keepdims=False)
        logits, cache = decode(last.reshape(-1, 1), search.cache)
        return choose(search._replace(cache=cache), logits[:, -1].reshape(*shape, -1))

    def unfinished(search: _Search) -> Bool[Array, ""]:
        return (search.step < steps) & search.going(early_stopping).any()

    search = _Search.begin(cache, shape, margin + steps, prompt.dtype)
    everywhere = jnp.broadcast_to(logits[:, None], (*shape, vocab_size))
    done = jax.lax.while_loop(unfinished, advance, choose(search, everywhere)).done
    new = done.tokens[..., margin:]
    tokens = jax.vmap(
        lambda new, drawn: loop.join(prompt, lengths, new, drawn, pad), in_axes=1, out_axes=1
    )(new, done.lengths)
    return Beams(tokens, lengths[:, None] + done.lengths, done.scores)


def _chooser(
    num_beams: int,
    steps: int,
    length_penalty: float,
    early_stopping: bool | str,
    ends: stops.Sequences,
) -> Callable[[_Search, Float[Array, "B K V"]], _Search]:
    candidates = max(2, 1 + len(ends)) * num_beams  # so many that K of them cannot have ended
    margin = stops.longest(ends)

    def divisor(length: Int[Array, ""] | int) -> Float[Array, ""]:
        return jnp.asarray(length, jnp.float32) ** length_penalty

    def choose(search: _Search, logits: Float[Array, "B K V"]) -> _Search:
        """Continues the live texts by one token each."""
        live, step = search.live, search.step
        batch, _, vocab_size = logits.shape
        scores = jax.nn.log_softmax(logits.astype(jnp.float32)) + live.scores[..., None]
        scores, index = jax.lax.top_k(scores.reshape(batch, -1), candidates)
        parent, token = index // vocab_size, index % vocab_size
        tokens = jnp.take_along_axis(live.tokens, parent[..., None], axis=1)
        tokens = tokens.at[..., margin + step].set(token.astype(tokens.dtype))
        lengths = jnp.full(scores.shape, step + 1)
        recent = jax.lax.dynamic_slice_in_dim(tokens, step + 1, margin, axis=2)
        ended = stops.ended(recent, ends) | (step + 1 == steps)

        first = (jnp.arange(candidates) < num_beams)[None]
        joins = ended & first & search.going(early_stopping)[:, None]
        final = jnp.where(joins, scores / divisor(step + 1), -jnp.inf)
        both = zip(search.done, _Texts(tokens, lengths, final))
        done, _ = _Texts(*(jnp.concatenate(pair, axis=1) for pair in both)).best(num_beams)

        running = jnp.where(ended, -jnp.inf, scores)
        live, order = _Texts(tokens, lengths, running).best(num_beams)
        parent = jnp.take_along_axis(parent, order, axis=1)
        rows = (jnp.arange(batch)[:, None] * num_beams + parent).reshape(-1)

        longest = steps if early_stopping == "never" and length_penalty > 0 else step + 1
        still = live.scores[:, 0] / divisor(longest) > done.scores.min(1)
        return _Search(search.cache.select(rows), step + 1, live, done, search.open & still)

    return choose
