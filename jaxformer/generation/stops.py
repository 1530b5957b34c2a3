"""Where a text ends: tokens, and sequences of tokens, after which nothing more is written."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int

Stop = SupportsIndex | Sequence[SupportsIndex | Sequence[SupportsIndex]] | None
Sequences = tuple[tuple[int, ...], ...]


def sequences(stop: Stop) -> Sequences:
    """Writes every way to name stops as sequences of tokens.

    One token `7`; several `(7, 9)`, each of which ends; sequences `((7, 9), (8,))`, each of which
    ends as a whole; both mixed `(7, (8, 9))`; nothing `None` or `()`.

    Raises:
        ValueError: If a sequence is empty or a token negative.
    """
    if stop is None:
        return ()
    if not isinstance(stop, Sequence):
        stop = (stop,)
    each = [part if isinstance(part, Sequence) else (part,) for part in stop]
    made = tuple(tuple(operator.index(token) for token in part) for part in each)
    for part in made:
        if not part:
            raise ValueError(f"a stop sequence has no tokens: {stop=}.")
        if min(part) < 0:
            raise ValueError(f"a stop token is negative: {stop=}.")
    return made


def longest(stops: Sequences) -> int:
    """The tokens one must remember to know whether a text has ended."""
    return max(map(len, stops), default=0)


def ended(recent: Int[Array, "*B L"], stops: Sequences) -> Bool[Array, "*B"]:
    """Whether texts end with one of the sequences, by their last L tokens; -1 is before the text.

    L is at least that of the longest.
    """
    done = jnp.zeros(recent.shape[:-1], bool)
    for part in stops:
        expected = jnp.asarray(part, recent.dtype).reshape((1,) * (recent.ndim - 1) + (-1,))
        done |= (recent[..., recent.shape[-1] - len(part) :] == expected).all(-1)
    return done
