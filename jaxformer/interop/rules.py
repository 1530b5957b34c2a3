"""Which tensors of a checkpoint make which parameter, and the way back."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter and its tensors.

    Attributes:
        ours: Path of the parameter, joined by "/".
        theirs: Names of the tensors.
        take: Makes the parameter of the tensors.
        give: Makes the tensors of the parameter; undoes `take` bit by bit.
        optional: Whether a checkpoint may lack the tensors; `take` is then given none.
    """

    ours: str
    theirs: tuple[str, ...]
    take: Callable[[Sequence[np.ndarray]], np.ndarray]
    give: Callable[[np.ndarray], Sequence[np.ndarray]]
    optional: bool = False


def same(ours: str, theirs: str) -> Rule:
    """One tensor, as it is."""
    return Rule(ours, (theirs,), lambda xs: xs[0], lambda x: (x,))


def turned(ours: str, theirs: str) -> Rule:
    """A matrix, output by input there, input by output here."""
    return Rule(ours, (theirs,), lambda xs: xs[0].T, lambda x: (x.T,))


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Matrices (as `turned`) or vectors side by side, of so many outputs each."""
    ends = np.cumsum(sizes)[:-1]

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        for name, x, size in zip(theirs, xs, sizes, strict=True):
            if x.shape[0] != size:
                raise ValueError(f"{name} has {x.shape[0]} outputs, expected {size}")
        return np.concatenate([x.T for x in xs], axis=-1)

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        return [part.T for part in np.split(x, ends, axis=-1)]

    return Rule(ours, tuple(theirs), take, give)


def interleaved(ours: str, theirs: str, heads: int) -> Rule:
    """A matrix or vector whose outputs are queries, keys and values head by head, fused there.

    Here all queries stand first, then all keys, then all values.
    """

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        (x,) = xs
        x = x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:]).T

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        x = x.T
        x = x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1)
        return (x.reshape(-1, *x.shape[3:]),)

    return Rule(ours, (theirs,), take, give)


def scalar(ours: str, theirs: str) -> Rule:
    """A number that is a vector of one there."""
    return Rule(ours, (theirs,), lambda xs: xs[0].reshape(()), lambda x: (x.reshape(1),))
