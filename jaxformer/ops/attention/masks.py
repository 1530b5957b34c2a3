"""Who may look at whom, as a value with structure rather than a T×S array of booleans.

A mask is a formula over the query's position `i`, the key's position `j` and the row of the batch:
atoms (`Band`, `Blocks`, `Summaries`, `Stride`, `FirstKeys`, `Segments`, `Explicit`) joined by `&`
and `|`. What is known while tracing is static, what is not is a leaf, so a mask passes through
`jit`, `vmap` and `scan` like any array, and a kernel can read off which blocks a formula empties.
Make masks with the lower-case functions; the classes are what a kernel takes apart.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int

Offset: TypeAlias = int | Int[Array, ""] | Int[Array, "B"]

_Class = TypeVar("_Class", bound=type)


class Mask:
    """A set of (row, head, query, key) that may look; `&` narrows it and `|` widens it."""

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        """Draws the mask: True where query t may look at key s.

        Returns:
            An array of rank 4 that broadcasts to B N T S; an axis that the mask does not depend on
            has size 1.

        Raises:
            ValueError: If the mask holds arrays of another T or S, or joins masks of other B, N.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to draw itself.")

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented


# In the classes below leaves are `Any`: JAX puts axis numbers, shapes or sentinels in their place.
@dataclass_transform(frozen_default=True)
def _value(cls: _Class) -> _Class:
    """Makes a frozen dataclass and a tree of the class: fields of type `Any` are its leaves."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    leaves = [field.name for field in dataclasses.fields(cls) if field.type is Any]
    static = [field.name for field in dataclasses.fields(cls) if field.type is not Any]
    return jax.tree_util.register_dataclass(cls, leaves, static)


@_value
class And(Mask):
    """Where both may look."""

    left: Any
    right: Any

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        return _join(operator.and_, self, query_length, key_length)


@_value
class Or(Mask):
    """Where either may look."""

    left: Any
    right: Any

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        return _join(operator.or_, self, query_length, key_length)


@_value
class Band(Mask):
    """Keys with `-left <= j - i <= right`; None is no limit on that side."""

    left: int | None
    right: int | None
    offset: int
    shift: Any = None

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        i, j = _positions(self, query_length, key_length)
        behind = True if self.left is None else j >= i - self.left
        ahead = True if self.right is None else j <= i + self.right
        return jnp.logical_and(behind, ahead)


@_value
class Blocks(Mask):
    """Keys in the query's own block of `block` consecutive positions."""

    block: int
    offset: int
    shift: Any = None

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        i, j = _positions(self, query_length, key_length)
        return i // self.block == j // self.block


@_value
class Summaries(Mask):
    """The last `count` keys of every block of `block`, whoever asks."""

    block: int
    count: int

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        return (jnp.arange(key_length) % self.block >= self.block - self.count)[None, None, None]


@_value
class Stride(Mask):
    """Keys at a distance that is a multiple of `stride`, on either side."""

    stride: int
    offset: int
    shift: Any = None

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        i, j = _positions(self, query_length, key_length)
        return (i - j) % self.stride == 0


@_value
class FirstKeys(Mask):
    """The first `lengths[b]` keys of row b."""

    lengths: Any

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        j = jnp.arange(key_length)[None, None, None]
        return j < self.lengths[:, None, None, None]


@_value
class Segments(Mask):
    """Keys whose id equals the query's."""

    query_ids: Any
    key_ids: Any

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        for ids, axis, size in (
            (self.query_ids, "T", query_length),
            (self.key_ids, "S", key_length),
        ):
            if ids.shape[1] != size:
                raise ValueError(
                    f"segments were given ids for {axis}={ids.shape[1]}, but the attention has "
                    f"{axis}={size}."
                )
        return (self.query_ids[:, :, None] == self.key_ids[:, None, :])[:, None]


@_value
class Explicit(Mask):
    """Whatever the array says; the one mask that no kernel can look through."""

    allowed: Any

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        allowed = self.allowed.reshape((1,) * (4 - self.allowed.ndim) + self.allowed.shape)
        for axis, found, size in zip("TS", allowed.shape[2:], (query_length, key_length)):
            if found not in (1, size):
                raise ValueError(
                    f"an explicit mask has {axis}={found}, but the attention has {axis}={size}."
                )
        return allowed


def causal(offset: Offset = 0) -> Mask:
    """Lets each query look at its own position and everything before.

    Args:
        offset: Position of query 0 among the keys, so that query t stands at `offset + t`. While
            decoding with a cache it is the number of tokens already there. An array may be traced;
            one of shape B gives each row its own.
    """
    return Band(None, 0, *_split(offset))


def window(left: int | None, right: int | None = 0, offset: Offset = 0) -> Mask:
    """Lets each query look at most `left` positions back and `right` ahead; None is no limit.

    `window(0)` is the position itself alone, `window(None, 0)` is `causal()`. A negative limit
    excludes the position itself: `window(None, -1)` is the strict past.

    Raises:
        ValueError: If nothing lies between the limits, or both are None.

    References:
        Beltagy et al. 2020, "Longformer", section 3.1. https://arxiv.org/abs/2004.05150
    """
    if left is None and right is None:
        raise ValueError("window needs a limit on one side at least; for none, pass no mask.")
    if left is not None and right is not None and left + right < 0:
        raise ValueError(f"window is empty: left={left} and right={right}.")
    return Band(left, right, *_split(offset))


def prefix(lengths: Int[Array, "B"]) -> Mask:
    """Lets everyone look at the first `lengths[b]` keys; `causal() | prefix(n)` is a prefix LM.

    References:
        Raffel et al. 2020, "T5", section 3.2.1. https://arxiv.org/abs/1910.10683
    """
    return FirstKeys(lengths)


def key_lengths(lengths: Int[Array, "B"]) -> Mask:
    """Hides the keys from `lengths[b]` on, as padding; `causal() & key_lengths(n)` is usual.

    The same set as `prefix(lengths)`, under the name of its other use.
    """
    return FirstKeys(lengths)


def segments(query_ids: Int[Array, "B T"], key_ids: Int[Array, "B S"] | None = None) -> Mask:
    """Lets queries look at keys of the same id, as for several texts packed into one row.

    Args:
        query_ids: Segment of each query.
        key_ids: Segment of each key; those of the queries if None. Padding is hidden by an id that
            no query has.

    Raises:
        ValueError: If the two have different B.
    """
    key_ids = query_ids if key_ids is None else key_ids
    if query_ids.shape[0] != key_ids.shape[0]:
        raise ValueError(
            f"segments: query_ids have B={query_ids.shape[0]}, key_ids have B={key_ids.shape[0]}."
        )
    return Segments(query_ids, key_ids)


def local_global(block: int, summary: int = 1, offset: Offset = 0) -> Mask:
    """Lets queries look at their own block, and at the last `summary` keys of every block.

    With `& causal()` and a block of √S, the cost of causal attention falls from S² to S√S.

    Raises:
        ValueError: If `summary` does not lie in 1..block.

    References:
        Child et al. 2019, "Sparse Transformers", section 4.3, the "fixed" pattern with both of its
        heads merged into one. https://arxiv.org/abs/1904.10509
    """
    if not 1 <= summary <= block:
        raise ValueError(f"local_global needs 1 <= summary <= block, got {summary=}, {block=}.")
    return Blocks(block, *_split(offset)) | Summaries(block, summary)


def strided(stride: int, offset: Offset = 0) -> Mask:
    """Lets queries look less than `stride` away, and at every distance that is a multiple of it.

    Raises:
        ValueError: If `stride` is less than 1.

    References:
        Child et al. 2019, "Sparse Transformers", section 4.3, the "strided" pattern with both
        heads merged into one; `& causal()` gives the paper's. https://arxiv.org/abs/1904.10509
    """
    if stride < 1:
        raise ValueError(f"strided needs stride >= 1, got {stride=}.")
    return window(stride - 1, stride - 1, offset) | Stride(stride, *_split(offset))


def explicit(allowed: Bool[Array, "..."]) -> Mask:
    """Lets query t look at key s where `allowed` is True; any rank up to 4, broadcast to B N T S.

    Raises:
        ValueError: If the rank is above 4, or the array not boolean (an additive one is a `bias`).
    """
    if allowed.ndim > 4 or allowed.dtype != bool:
        raise ValueError(
            "explicit needs booleans that broadcast to B N T S, got "
            f"dtype={allowed.dtype}, shape={allowed.shape}."
        )
    return Explicit(allowed)


def _split(offset: Offset) -> tuple[int, Array | None]:
    """The static and the traced part of an offset; their sum is the offset."""
    return (0, offset) if isinstance(offset, Array) else (operator.index(offset), None)


def _positions(mask: Any, query_length: int, key_length: int) -> tuple[Array, Array]:
    i = (mask.offset + jnp.arange(query_length))[None, None, :, None]
    if mask.shift is not None:
        i = i + mask.shift.reshape(-1, 1, 1, 1)
    return i, jnp.arange(key_length)[None, None, None]


def _join(operation: Callable, mask: Any, query_length: int, key_length: int) -> Array:
    left = mask.left.dense(query_length, key_length)
    right = mask.right.dense(query_length, key_length)
    for axis, one, other in zip("BNTS", left.shape, right.shape):
        if one != other and 1 not in (one, other):
            raise ValueError(f"joined masks disagree: {axis}={one} and {axis}={other}.")
    return operation(left, right)
