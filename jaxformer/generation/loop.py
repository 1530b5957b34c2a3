"""The step that all loops of decoding share: feed each row its last token, choose its next one.

The model is a function and a cache:

    decode(tokens: Int[B T], cache, counts: Int[B]) -> (logits: Float[B T V], cache)

runs the next T tokens of each row, of which the first `counts` are real; the rest is padding whose
logits are ignored and which leaves no trace. The cache is any tree, and alone knows the position of
each row. A model whose rows are always at the same place may leave `counts` out: it is passed only
where rows differ. After a prompt of several tokens, only the logits of each row's last real token
are asked for, so that no array has P times V numbers a row:

    decode(tokens, cache, counts, last=True) -> (logits: Float[B 1 V], cache)

Beams and speculation ask more of the cache; see `RowCache`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxformer.generation import samplers, stops
from jaxformer.typing import Array, Bool, Float, Int, Key

Cache = Any
Decode = Callable[..., tuple[Float[Array, "B T V"], Cache]]


@runtime_checkable
class RowCache(Protocol):
    """A cache whose rows can be chosen and shortened one by one.

    It may also have a static `max_length`, the tokens a row has room for: prompts that are known
    not to fit are then refused; and a static `max_rewind`, the tokens that `rewind` can forget
    unless that is None: drafts of more are refused.

    Attributes:
        length: Tokens of each row so far.
    """

    length: Int[Array, "B"]

    def select(self, rows: Int[Array, "B2"]) -> "RowCache":
        """Takes rows of the batch, some perhaps several times, others not at all."""
        ...

    def rewind(self, lengths: Int[Array, "B"]) -> "RowCache":
        """Forgets each row's tokens from that length on."""
        ...


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a compiled loop fixes.

    Attributes:
        sample: Chooses the next token.
        stop: Sequences that end a row.
        pad: What rows that have ended are fed, and filled with.
        ragged: Whether rows are at places of their own.
    """

    sample: samplers.Sample
    stop: stops.Sequences
    pad: int
    ragged: bool


class State(NamedTuple):
    """What goes from one token to the next.

    Attributes:
        cache: Holds all tokens of each row but the last, which is in `last`.
        last: The next to feed.
        drawn: Tokens drawn so far.
        left: Tokens a row may still draw; 0 once it has ended.
        recent: The last ones drawn, as many as the longest stop has; -1 before the first.
        seen: The tokens of prompt and output, if the sampler asks; else None.
        position: Of the next token, for its key: of all rows, or of each if each has a key.
        key: One, or one a row.
    """

    cache: Cache
    last: Int[Array, "B"]
    drawn: Int[Array, "B"]
    left: Int[Array, "B"]
    recent: Int[Array, "B L"]
    seen: Bool[Array, "B V"] | None
    position: Int[Array, ""] | Int[Array, "B"]
    key: Key[Array, ""] | Key[Array, "B"]


def call(
    decode: Decode, tokens: Int[Array, "B T"], cache: Cache, counts: Int[Array, "B"] | None
) -> tuple[Float[Array, "B #T V"], Cache]:
    """Runs the model, with counts only if there are any."""
    return decode(tokens, cache) if counts is None else decode(tokens, cache, counts)


def prefill(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    *,
    ragged: bool,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads every prompt in one call; returns the logits after each.

    Raises:
        ValueError: If the model returns the logits of more than one place a row.
    """
    if prompt.shape[1] > 1:
        decode = functools.partial(decode, last=True)
    logits, cache = call(decode, prompt, cache, lengths if ragged else None)
    if logits.shape[1] != 1:
        raise ValueError(f"a prompt's logits are of one place, got T={logits.shape[1]}.")
    return logits[:, 0], cache


def start(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    left: Int[Array, "B"],
    key: Key[Array, ""] | Key[Array, "B"],
    rules: Rules,
) -> tuple[State, Int[Array, "B"], Float[Array, "B"]]:
    """Reads the prompts and draws the first token of each row that may draw any.

    Returns:
        The state, the tokens, and their log-probabilities.
    """
    batch, width = prompt.shape
    logits, cache = prefill(decode, cache, prompt, lengths, ragged=rules.ragged)
    seen = None
    if samplers.tracks_seen(rules.sample):
        seen = samplers.seen_tokens(prompt, lengths, logits.shape[-1])
    state = State(
        cache,
        last=jnp.full(batch, rules.pad, prompt.dtype),
        drawn=jnp.zeros(batch, jnp.int32),
        left=left,
        recent=jnp.full((batch, stops.longest(rules.stop)), -1, prompt.dtype),
        seen=seen,
        position=jnp.asarray(width, jnp.int32) if key.ndim == 0 else lengths,
        key=key,
    )
    return draw(state, logits, rules)


def run(
    decode: Decode, state: State, count: int, rules: Rules
) -> tuple[State, Int[Array, "B {count}"], Float[Array, "B {count}"]]:
    """Draws `count` more tokens a row, or fewer where a row ends; stops when all have.

    Returns:
        The state, the tokens, and their log-probabilities; `pad` and 0 after a row's end.
    """
    batch = state.last.shape[0]

    def advance(carry: tuple) -> tuple:
        i, state, tokens, scores = carry
        counts = (state.left > 0).astype(jnp.int32) if rules.ragged else None
        logits, cache = call(decode, state.last[:, None], state.cache, counts)
        state, token, score = draw(state._replace(cache=cache), logits[:, -1], rules)
        return i + 1, state, tokens.at[:, i].set(token), scores.at[:, i].set(score)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        return (carry[0] < count) & (carry[1].left > 0).any()

    tokens = jnp.full((batch, count), rules.pad, state.last.dtype)
    scores = jnp.zeros((batch, count))
    if count == 0:
        return state, tokens, scores
    return jax.lax.while_loop(
        unfinished, advance, (jnp.zeros((), jnp.int32), state, tokens, scores)
    )[1:]


def draw(
    state: State, logits: Float[Array, "B V"], rules: Rules
) -> tuple[State, Int[Array, "B"], Float[Array, "B"]]:
    """Chooses each row's next token; `pad` where the row has ended.

    Returns:
        The state, the tokens, and their log-probabilities under the model itself.
    """
    active = state.left > 0
    seen = () if state.seen is None else (state.seen,)

    def alone(key: Array, *row: Array) -> Array:
        return rules.sample(key, *(part[None] for part in row))[0]

    if state.key.ndim == 0:
        key = jax.random.fold_in(state.key, state.position)
        token = rules.sample(key, logits, *seen)
    else:
        keys = jax.vmap(jax.random.fold_in)(state.key, state.position)
        token = jax.vmap(alone)(keys, logits, *seen)
    token = jnp.where(active, token.astype(state.last.dtype), rules.pad)
    every = jax.nn.log_softmax(logits.astype(jnp.float32))
    score = jnp.take_along_axis(every, token[:, None], axis=1, mode="clip")[:, 0]
    state = take(state, token, active, rules)
    return state._replace(position=state.position + 1), token, jnp.where(active, score, 0)


def take(state: State, token: Int[Array, "B"], active: Bool[Array, "B"], rules: Rules) -> State:
    """Appends a token to the active rows, which may end them."""
    recent = state.recent
    if rules.stop:
        longer = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
        recent = jnp.where(active[:, None], longer, recent)
    left = state.left - active
    return state._replace(
        last=jnp.where(active, token, state.last),
        drawn=state.drawn + active,
        left=jnp.where(active & stops.ended(recent, rules.stop), 0, left),
        recent=recent,
        seen=None if state.seen is None else mark(state.seen, token, active),
    )


def mark(
    seen: Bool[Array, "B V"], token: Int[Array, "B"], active: Bool[Array, "B"]
) -> Bool[Array, "B V"]:
    """Adds a token to what the active rows have seen."""
    return seen | (jax.nn.one_hot(token, seen.shape[-1], dtype=bool) & active[:, None])


def join(
    prompt: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    new: Int[Array, "B N"],
    drawn: Int[Array, "B"],
    pad: int,
) -> Int[Array, "B P+N"]:
    """Puts each row's new tokens right behind its own prompt, and `pad` behind both."""
    width = prompt.shape[1]
    columns = jnp.arange(width + new.shape[1])[None]
    place = columns - lengths[:, None]
    source = jnp.where(place < 0, columns, jnp.minimum(width + place, columns.size - 1))
    text = jnp.take_along_axis(jnp.concatenate([prompt, new], axis=1), source, axis=1)
    return jnp.where(place < drawn[:, None], text, pad)


def prepare(
    caches: tuple[Cache, ...],
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"] | None,
    steps: int,
    limits: Int[Array, "B"] | None,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Checks what is known of lengths and limits at tracing, and writes both out.

    Raises:
        ValueError: If P or `steps`, a known length or limit is outside its range, or a known
            prompt does not fit in a cache of known room.
    """
    batch, width = prompt.shape
    if width < 1:
        raise ValueError(f"the prompt needs at least one token, got P={width}.")
    if steps < 0:
        raise ValueError(f"generation needs steps >= 0, got {steps=}.")
    given = np.full(batch, width) if prompt_lengths is None else prompt_lengths
    most = np.full(batch, steps) if limits is None else limits
    for row, length in enumerate(_known(given, ())):
        if not 1 <= length <= width:
            raise ValueError(f"prompt_lengths[{row}]={length} is not between 1 and P={width}.")
    for row, limit in enumerate(_known(most, ())):
        if limit < 0:
            raise ValueError(f"limits[{row}]={limit} is negative.")
    for cache in caches:
        room = getattr(cache, "max_length", None)
        if room is not None and not isinstance(given, Tracer):
            new = np.minimum(_known(most, 1), steps)
            held = np.broadcast_to(_known(cache.length, 0), (batch,))
            need = held + np.asarray(given) + np.maximum(new, 1) - 1
            row = int(need.argmax())
            if need[row] > room:
                raise ValueError(
                    f"prompt_lengths[{row}]={given[row]} and what is to follow need {need[row]}"
                    f" places; the cache has room for {room}."
                )
    return jnp.asarray(given, jnp.int32), jnp.minimum(jnp.asarray(most, jnp.int32), steps)


def _known(values: Any, otherwise: Any) -> np.ndarray:
    return np.asarray(otherwise if isinstance(values, Tracer) else values)
