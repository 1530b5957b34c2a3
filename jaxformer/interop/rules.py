"""Which tensors of a checkpoint make which parameter, and the way back."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
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


def affine(ours: str, theirs: str) -> list[Rule]:
    """The weights of a linear map and its bias."""
    return [turned(f"{ours}/kernel", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Rule]:
    """The scale of a norm and its bias."""
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def reshaped(ours: str, theirs: str, there: tuple[int, ...], here: tuple[int, ...]) -> Rule:
    """The same numbers in another shape."""

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        if xs[0].shape != there:
            raise ValueError(f"{theirs} has shape {xs[0].shape}, expected {there}")
        return xs[0].reshape(here)

    return Rule(ours, (theirs,), take, lambda x: (x.reshape(there),))


def convolution(ours: str, theirs: str, window: tuple[int, ...], channels: int) -> Rule:
    """The weights of a convolution, outputs by channels by window there, window first here.

    Here they are a matrix: all numbers in a window, the channels of a place together, by outputs.
    """
    axes = len(window)

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        if xs[0].shape[1:] != (channels, *window):
            raise ValueError(
                f"{theirs} has windows of {xs[0].shape[1:]}, expected {(channels, *window)}"
            )
        return xs[0].transpose(*range(2, axes + 2), 1, 0).reshape(-1, xs[0].shape[0])

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        return (x.reshape(*window, channels, -1).transpose(axes + 1, axes, *range(axes)),)

    return Rule(ours, (theirs,), take, give)


def beside(rule: Rule, theirs: str, constant: np.ndarray) -> Rule:
    """A rule and a tensor that is no parameter here, and must be `constant`."""

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        if not alike(xs[-1], constant):
            raise ValueError(f"{theirs} is not the {constant.shape} numbers that it should be")
        return rule.take(xs[:-1])

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        return (*rule.give(x), constant.astype(x.dtype))

    return Rule(rule.ours, (*rule.theirs, theirs), take, give)


def alike(x: np.ndarray, constant: np.ndarray) -> bool:
    """Whether these are the numbers, up to 1e-5 or to what the dtype of `x` cannot tell from 1."""
    allowed = max(1e-5, float(jnp.finfo(x.dtype).eps))
    x = x.astype(np.float32)
    return x.shape == constant.shape and np.allclose(x, constant, rtol=0, atol=allowed)
