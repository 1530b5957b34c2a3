"""Speculative decoding: a small model proposes, the large one checks many tokens in one call.

What is written has exactly the distribution of the large model's own sampling.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.generation import loop, stops
from jaxformer.generation.loop import Decode, RowCache
from jaxformer.generation.samplers import Greedy, Sampler
from jaxformer.generation.stops import Stop
from jaxformer.typing import Array, Bool, Float, Int, Key


class Speculation(NamedTuple):
    """Prompts, what was written after them, and how good the draft was.

    Attributes:
        tokens: Each row's own prompt, its new tokens, then `pad` to the end.
        lengths: Tokens of each row, prompt and new ones; the stop that ended it is among them.
        accepted: Proposals that became part of the text.
        proposed: Proposals that could have: `accepted / proposed` is the acceptance rate.
        calls: Of the target for the row, the prompt's included: new tokens over calls is the gain.
        cache: The target's; it holds all of each row but its last new token.
        draft_cache: The draft's; likewise.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    accepted: Int[Array, "B"]
    proposed: Int[Array, "B"]
    calls: Int[Array, "B"]
    cache: RowCache
    draft_cache: RowCache


@dataclasses.dataclass(frozen=True)
class _Rules(loop.Rules):
    filtered: Callable[..., Float[Array, "*B V"]]  # what the sampler leaves of logits
    draft_steps: int


class _Round(NamedTuple):
    number: Int[Array, ""]
    state: loop.State
    draft_cache: RowCache
    tokens: Int[Array, "B N"]
    accepted: Int[Array, "B"]
    proposed: Int[Array, "B"]
    calls: Int[Array, "B"]


def speculate(
    decode: Decode,
    cache: RowCache,
    draft: Decode,
    draft_cache: RowCache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    draft_steps: int,
    sample: Sampler | Greedy,
    key: Key[Array, ""],
    prompt_lengths: Int[Array, "B"] | None = None,
    limits: Int[Array, "B"] | None = None,
    stop: Stop = None,
    pad: int = 0,
) -> Speculation:
    """Continues every prompt by up to `steps` tokens, as `decode.complete` with the target alone.

    In each round the draft writes `draft_steps` tokens, the target reads them in one call, every
    row accepts its own number of them, and gets one more token from the target. The distribution
    is that of the target filtered by `sample`, whatever the draft is; with `greedy()` the tokens
    are the target's own. (In floating point: the target's logits for many tokens in one call may
    differ from those one by one in the last digits.)

    A pure function for `jit`, like `decode.complete`. The same key gives the same tokens, but not
    those of `decode.complete`, which draws in another way.

    Args:
        decode: The target, `decode(tokens, cache, counts)` as in `generation.loop`.
        cache: The target's, with room for P + `steps` - 1 more tokens.
        draft: A faster model of the same tokens.
        draft_cache: The draft's, with the same room.
        prompt: Tokens, padded on the right with anything; P is 1 or more.
        steps: The most new tokens a row can have, 0 or more.
        draft_steps: Proposals a round, 1 or more, and no more than the caches can rewind.
        sample: Filters both models' distributions; from `samplers`.
        key: A typed key.
        prompt_lengths: Tokens of each row's prompt, from 1 to P; by default all have P.
        limits: New tokens that each row may have, if fewer than `steps`.
        stop: Tokens, or sequences of tokens, as `stops.sequences` reads them. They are kept.
        pad: Token that fills up rows.

    Raises:
        ValueError: As `decode.complete`, or if `draft_steps` is below 1, or above what a cache is
            known to rewind.

    References:
        Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
        algorithm 1. https://arxiv.org/abs/2211.17192
        Chen et al. 2023, algorithm 2. https://arxiv.org/abs/2302.01318
    """
    if draft_steps < 1:
        raise ValueError(f"speculation needs draft_steps >= 1, got {draft_steps=}.")
    for name, held in (("cache", cache), ("draft_cache", draft_cache)):
        most = getattr(held, "max_rewind", None)
        if most is not None and draft_steps > most:
            raise ValueError(f"{draft_steps=} exceeds the {most} tokens that {name} can rewind.")
    lengths, left = loop.prepare((cache, draft_cache), prompt, prompt_lengths, steps, limits)
    rules = _Rules(sample, stops.sequences(stop), pad, True, sample.filtered, draft_steps)
    batch = prompt.shape[0]
    none = jnp.zeros(batch, jnp.int32)
    if steps == 0:
        tokens = loop.join(prompt, lengths, jnp.zeros((batch, 0), prompt.dtype), none, pad)
        return Speculation(tokens, lengths, none, none, none, cache, draft_cache)

    key, first = jax.random.split(key)
    state, token, _ = loop.start(decode, cache, prompt, lengths, left, first, rules)
    _, draft_cache = loop.prefill(draft, draft_cache, prompt, lengths, ragged=True)
    tokens = jnp.full((batch, steps), pad, prompt.dtype).at[:, 0].set(token)
    now = _Round(jnp.zeros((), jnp.int32), state, draft_cache, tokens, none, none, none + 1)

    def advance(now: _Round) -> _Round:
        return _round(decode, draft, jax.random.fold_in(key, now.number), now, rules)

    end = jax.lax.while_loop(lambda now: (now.state.left > 0).any(), advance, now)
    tokens = loop.join(prompt, lengths, end.tokens, end.state.drawn, pad)
    counts = (end.accepted, end.proposed, end.calls)
    return Speculation(tokens, lengths + end.state.drawn, *counts, end.state.cache, end.draft_cache)


def verify(
    key: Key[Array, ""],
    proposals: Int[Array, "B G"],
    draft_log_probs: Float[Array, "B G V"],
    log_probs: Float[Array, "B G+1 V"],
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Accepts a beginning of each row's proposals, and draws the token that follows it.

    A proposal x is accepted with probability min(1, p(x) / q(x)), p the target's and q the draft's.
    The token after the first that is not is drawn from max(p - q, 0), normalised; if all are
    accepted, from the target's last distribution.

    Args:
        key: A typed key.
        proposals: Drawn from the draft.
        draft_log_probs: What each was drawn from.
        log_probs: The target's at the same places, and after all of them.

    Returns:
        The number of accepted proposals, and the token after them.
    """
    accept_key, draw_key = jax.random.split(key)
    p, q = jnp.exp(log_probs), jnp.exp(draft_log_probs)
    at = proposals[..., None]
    p_at = jnp.take_along_axis(p[:, :-1], at, axis=-1)[..., 0]
    q_at = jnp.take_along_axis(q, at, axis=-1)[..., 0]
    passed = jax.random.uniform(accept_key, proposals.shape) * q_at < p_at
    accepted = jnp.cumprod(passed.astype(jnp.int32), axis=1).sum(1)

    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # nothing is proposed after the last: p - 0
    here = accepted[:, None, None]
    p, q = (jnp.take_along_axis(part, here, axis=1)[:, 0] for part in (p, q))
    rest = jnp.maximum(p - q, 0)
    # Where p equals q nothing is rejected, unless rounding does it.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
    return accepted, jax.random.categorical(draw_key, jnp.log(rest))


def _round(decode: Decode, draft: Decode, key: Array, now: _Round, rules: _Rules) -> _Round:
    """Proposes, checks and appends, for every row that has not ended."""
    state, held, draft_held = now.state, now.state.cache.length, now.draft_cache.length
    draft_key, verify_key = jax.random.split(key)
    draft_cache, proposals, log_q, seen = _propose(draft, now.draft_cache, state, draft_key, rules)
    proposals = proposals.astype(state.last.dtype)
    fed = jnp.concatenate([state.last[:, None], proposals], axis=1)
    # A row with few tokens left needs no more logits than those, nor room for more.
    logits, cache = decode(fed, state.cache, jnp.minimum(rules.draft_steps + 1, state.left))
    log_p = jax.nn.log_softmax(rules.filtered(logits, seen))
    accepted, token = verify(verify_key, proposals, log_q, log_p)

    places = jnp.arange(rules.draft_steps + 1)[None]
    new = jnp.pad(proposals, ((0, 0), (0, 1)))
    new = jnp.where(places == accepted[:, None], token.astype(new.dtype)[:, None], new)

    def append(state: loop.State, column: tuple) -> tuple[loop.State, Bool[Array, "B"]]:
        token, offered = column
        active = offered & (state.left > 0)
        return loop.take(state, token, active, rules), active

    offered = places <= accepted[:, None]
    after, kept = jax.lax.scan(append, state._replace(cache=()), (new.T, offered.T))
    kept = kept.T
    count = kept.sum(1)
    where = jnp.where(kept, state.drawn[:, None] + places, now.tokens.shape[1])
    rows = jnp.arange(new.shape[0])[:, None]
    return _Round(
        now.number + 1,
        after._replace(cache=cache.rewind(held + count)),
        draft_cache.rewind(draft_held + count),
        now.tokens.at[rows, where].set(new, mode="drop"),
        now.accepted + (kept & (places < accepted[:, None])).sum(1),
        now.proposed + jnp.minimum(rules.draft_steps, state.left),
        now.calls + (state.left > 0),
    )


def _propose(
    draft: Decode,
    cache: RowCache,
    state: loop.State,
    key: Array,
    rules: _Rules,
) -> tuple[RowCache, Int[Array, "B G"], Float[Array, "B G V"], Bool[Array, "B G+1 V"] | None]:
    """Draws from the draft, which reads the last proposal too: the row may accept all of them.

    Returns:
        Cache, proposals, the log-probabilities that each was drawn from, and what was seen before
        each and after the last.
    """

    def advance(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, tuple]:
        cache, token, seen = carry
        logits, cache = draft(token[:, None], cache, (i < state.left).astype(jnp.int32))
        log_q = jax.nn.log_softmax(rules.filtered(logits[:, -1], seen))
        drawn = jax.random.categorical(jax.random.fold_in(key, i), log_q).astype(token.dtype)
        after = None if seen is None else loop.mark(seen, drawn, state.left > 0)
        return (cache, drawn, after), (drawn, log_q, seen)

    carry = (cache, state.last, state.seen)
    (cache, _, _), made = jax.lax.scan(advance, carry, jnp.arange(rules.draft_steps + 1))
    drawn, log_q, seen = jax.tree.map(lambda part: part.swapaxes(0, 1), made)
    return cache, drawn[:, :-1], log_q[:, :-1], seen
