"""Who may look at whom, as a value with structure rather than a T×S array of booleans.

A mask is a formula over the query's position `i`, the key's position `j` and the row of the batch:
atoms (`Band`, `Blocks`, `Summaries`, `Stride`, `Coarse`, `FirstKeys`, `Segments`, `Explicit`),
joined by `&` and `|`. What is known while tracing is static, what is not is a leaf, so a mask
passes through `jit`, `vmap` and `scan` like any array. Make masks with the lower-case functions.

Kernels take a mask apart by two methods. `tile(i, j)` draws any rectangle of it, where the leaves
have been replaced by their parts that belong there. `bounds(i, j)` takes ranges instead of numbers
and says whether every, and whether any, pair in the rectangle may look; `blocks` makes lists of it.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int

Offset: TypeAlias = int | Int[Array, ""] | Int[Array, "B"]
Range: TypeAlias = tuple[Any, Any]  # the least and the greatest value, both included

_Class = TypeVar("_Class", bound=type)


class Mask:
    """A set of (row, head, query, key) that may look; `&` narrows it and `|` widens it."""

    AXES: ClassVar[dict[str, str]] = {}
    """For each field that is a leaf, the axes of its canonical form: "B", "BT", "BS" or "BNTS"."""

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "#B #N #T #S"]:
        """Draws the mask: True where query t may look at key s.

        Returns:
            An array of rank 4 that broadcasts to B N T S; an axis that the mask does not depend on
            has size 1.

        Raises:
            ValueError: If the mask holds arrays of another T or S, or joins masks of other B, N.
        """
        canonical = self.canonical(query_length, key_length)
        check_joined(canonical)
        i, j = jnp.arange(query_length), jnp.arange(key_length)
        return canonical.tile(i[None, None, :, None], j[None, None, None])

    def at(self, query_length: int, places: Int[Array, "#B S"]) -> Bool[Array, "#B #N #T #S"]:
        """Draws the mask where key s of row b is the one at `places[b, s]`, in any order.

        Keys past the end of an array in the mask are hidden.

        Raises:
            ValueError: If the mask holds arrays of another T, or joins masks of other B, N.
        """

        def picked(axes: str, leaf: Array) -> Array:
            if axes == "BNTS":
                leaf = leaf.reshape((1,) * (4 - leaf.ndim) + leaf.shape)
            if axes[-1] != "S" or (axes == "BNTS" and leaf.shape[-1] == 1):
                return leaf
            index = places.reshape(places.shape[0], *(1,) * (leaf.ndim - 2), -1)
            hidden = False if leaf.dtype == bool else None  # None: an id that nobody has
            return jnp.take_along_axis(leaf, index, axis=-1, mode="fill", fill_value=hidden)

        canonical = self.map(picked).canonical(query_length, places.shape[1])
        check_joined(canonical)
        queries = jnp.arange(query_length)[None, None, :, None]
        return canonical.tile(queries, places[:, None, None])

    def tile(self, i: Any, j: Any) -> Any:
        """Draws the rectangle of queries `i` and keys `j`, integers that broadcast together.

        Leaves must have been replaced by what broadcasts along: the length of this row of the
        batch, the segments of these queries, and so on. The result broadcasts to the rectangle.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to draw itself.")

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        """Says whether every, and whether any, of the pairs in the ranges may look.

        Leaves must have been replaced by their own ranges there. The answers err on the safe side
        (not every, some) where a join leaves them open. NumPy in, NumPy out.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it bounds.")

    def map(self, f: Callable[[str, Any], Any]) -> "Mask":
        """Replaces each leaf by `f(axes, leaf)`, in the order of `jax.tree.leaves`."""
        changes = {
            name: f(axes, getattr(self, name))
            for name, axes in self.AXES.items()
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore

    def canonical(self, query_length: int, key_length: int) -> "Mask":
        """Gives each leaf the rank 4 of B N T S, with size 1 for the axes that it lacks.

        Raises:
            ValueError: If a leaf has another T or S.
        """
        sizes = {"T": query_length, "S": key_length}

        def reshaped(axes: str, leaf: Array) -> Array:
            if axes == "BNTS":
                return _checked(leaf.reshape((1,) * (4 - leaf.ndim) + leaf.shape), sizes)
            if leaf.ndim == 4:
                return leaf
            if axes == "B":
                return leaf.reshape(-1, 1, 1, 1)
            if leaf.shape[1] != sizes[axes[1]]:
                raise ValueError(
                    f"segments were given ids for {axes[1]}={leaf.shape[1]}, but the attention has "
                    f"{axes[1]}={sizes[axes[1]]}."
                )
            return leaf[:, None, :, None] if axes == "BT" else leaf[:, None, None, :]

        return self.map(reshaped)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented


# In the classes below leaves are `Any`: JAX puts axis numbers, shapes or sentinels in their place.
@dataclass_transform(frozen_default=True)
def _value(cls: _Class) -> _Class:
    """Makes a frozen dataclass and a tree of the class: fields of type `Any` are its leaves.

    `jax.tree_util.register_dataclass` would not do: it calls the structures of two classes equal
    whose static fields are, so that `a & b` could be taken for `a | b` from a cache.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    leaves = [field.name for field in fields if field.type is Any]
    static = [field.name for field in fields if field.type is not Any]

    def flatten(mask: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keys = [(jax.tree_util.GetAttrKey(name), getattr(mask, name)) for name in leaves]
        return keys, (cls, *(getattr(mask, name) for name in static))

    def unflatten(values: tuple[Any, ...], children: Any) -> Any:
        return cls(**dict(zip(leaves, children)), **dict(zip(static, values[1:])))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class _Join(Mask):
    """Two masks and what joins their booleans."""

    left: Any
    right: Any
    OPERATOR: ClassVar[Callable[[Any, Any], Any]]

    def tile(self, i: Any, j: Any) -> Any:
        return type(self).OPERATOR(self.left.tile(i, j), self.right.tile(i, j))

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        pairs = zip(self.left.bounds(i, j), self.right.bounds(i, j))
        every, some = (type(self).OPERATOR(left, right) for left, right in pairs)
        return every, some

    def map(self, f: Callable[[str, Any], Any]) -> Mask:
        return type(self)(self.left.map(f), self.right.map(f))  # type: ignore


@_value
class And(_Join):
    """Where both may look."""

    left: Any
    right: Any
    OPERATOR = staticmethod(operator.and_)


@_value
class Or(_Join):
    """Where either may look."""

    left: Any
    right: Any
    OPERATOR = staticmethod(operator.or_)


class _Placed(Mask):
    """A formula in which query t stands at `offset + shift + t`."""

    AXES: ClassVar[dict[str, str]] = {"shift": "B"}
    offset: int
    shift: Any

    def _place(self, i: Any) -> Any:
        i = i + self.offset
        return i if self.shift is None else i + self.shift

    def _range(self, i: Range) -> Range:
        low, high = i[0] + self.offset, i[1] + self.offset
        return (low, high) if self.shift is None else (low + self.shift[0], high + self.shift[1])


@_value
class Band(_Placed):
    """Keys with `-left <= j - i <= right`; None is no limit on that side."""

    left: int | None
    right: int | None
    offset: int
    shift: Any = None

    def tile(self, i: Any, j: Any) -> Any:
        i = self._place(i)
        if self.left is None:
            return j <= i + self.right
        behind = j >= i - self.left
        return behind if self.right is None else behind & (j <= i + self.right)

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        i = self._range(i)
        every, some = [], []
        if self.left is not None:
            every.append(j[0] >= i[1] - self.left)
            some.append(j[1] >= i[0] - self.left)
        if self.right is not None:
            every.append(j[1] <= i[0] + self.right)
            some.append(j[0] <= i[1] + self.right)
        return (every[0] & every[1], some[0] & some[1]) if len(every) == 2 else (every[0], some[0])


@_value
class Blocks(_Placed):
    """Keys in the query's own block of `block` consecutive positions."""

    block: int
    offset: int
    shift: Any = None

    def tile(self, i: Any, j: Any) -> Any:
        return self._place(i) // self.block == j // self.block

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        first, last = (x // self.block for x in self._range(i))
        start, end = (x // self.block for x in j)
        return (first == end) & (start == last), (first <= end) & (start <= last)


@_value
class Summaries(Mask):
    """The last `count` keys of every block of `block`, whoever asks."""

    block: int
    count: int

    def tile(self, i: Any, j: Any) -> Any:
        return j % self.block >= self.block - self.count

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        found = self._before(j[1] + 1) - self._before(j[0])
        return found == j[1] - j[0] + 1, found > 0

    def _before(self, j: Any) -> Any:
        """The summaries among the keys before `j`."""
        rest = j % self.block - (self.block - self.count)
        return j // self.block * self.count + rest * (rest > 0)


@_value
class Stride(_Placed):
    """Keys at a distance that is a multiple of `stride`, on either side."""

    stride: int
    offset: int
    shift: Any = None

    def tile(self, i: Any, j: Any) -> Any:
        return (self._place(i) - j) % self.stride == 0

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        i = self._range(i)
        low, high = i[0] - j[1], i[1] - j[0]
        some = high // self.stride * self.stride >= low
        return some & ((low == high) | (self.stride == 1)), some


@_value
class Coarse(Mask):
    """A static mask of groups, of `queries` consecutive queries and `keys` consecutive keys."""

    inner: Any
    queries: int
    keys: int

    def tile(self, i: Any, j: Any) -> Any:
        return self.inner.tile(i // self.queries, j // self.keys)

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        first, last = (x // self.queries for x in i)
        start, end = (x // self.keys for x in j)
        return self.inner.bounds((first, last), (start, end))


@_value
class FirstKeys(Mask):
    """The first `lengths[b]` keys of row b."""

    AXES: ClassVar[dict[str, str]] = {"lengths": "B"}
    lengths: Any

    def tile(self, i: Any, j: Any) -> Any:
        return j < self.lengths

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        return j[1] < self.lengths[0], j[0] < self.lengths[1]


@_value
class Segments(Mask):
    """Keys whose id equals the query's."""

    AXES: ClassVar[dict[str, str]] = {"query_ids": "BT", "key_ids": "BS"}
    query_ids: Any
    key_ids: Any

    def tile(self, i: Any, j: Any) -> Any:
        return self.query_ids == self.key_ids

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        low, high = self.query_ids
        start, end = self.key_ids
        return (low == end) & (start == high), (low <= end) & (start <= high)


@_value
class Explicit(Mask):
    """Whatever the array says; the one mask that no kernel can look through."""

    AXES: ClassVar[dict[str, str]] = {"allowed": "BNTS"}
    allowed: Any

    def tile(self, i: Any, j: Any) -> Any:
        return self.allowed

    def bounds(self, i: Range, j: Range) -> tuple[Any, Any]:
        return self.allowed


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


def coarse(mask: Mask, queries: int, keys: int) -> Mask:
    """Lets all of a group of queries look at all of a group of keys where `mask` lets the groups.

    `coarse(causal(), 64, 64)` is causal between blocks of 64 and full within each.

    Args:
        mask: A mask whose positions are the numbers of groups; without arrays.
        queries: Consecutive queries in a group.
        keys: Consecutive keys in a group.

    Raises:
        ValueError: If a group is empty, or `mask` holds arrays.
    """
    if queries < 1 or keys < 1:
        raise ValueError(f"coarse needs groups of at least 1, got {queries=}, {keys=}.")
    if jax.tree.leaves(mask):
        raise ValueError(f"coarse takes a mask without arrays, got {mask}.")
    return Coarse(mask, queries, keys)


def leaf_axes(mask: Mask | None) -> list[str]:
    """The axes of the leaves of a mask, in the order of `jax.tree.leaves`."""
    found: list[str] = []
    if mask is not None:
        mask.map(lambda axes, leaf: found.append(axes))
    return found


def check_joined(mask: Mask) -> None:
    """Raises a ValueError if leaves of a canonical mask do not broadcast together."""
    found = [1, 1, 1, 1]
    for leaf in jax.tree.leaves(mask):
        for axis, size in enumerate(leaf.shape):
            if 1 not in (size, found[axis]) and size != found[axis]:
                raise ValueError(
                    f"joined masks disagree: {'BNTS'[axis]}={found[axis]} and "
                    f"{'BNTS'[axis]}={size}."
                )
            found[axis] = max(found[axis], size)


def _split(offset: Offset) -> tuple[int, Array | None]:
    """The static and the traced part of an offset; their sum is the offset."""
    return (0, offset) if isinstance(offset, Array) else (operator.index(offset), None)


def _checked(allowed: Array, sizes: dict[str, int]) -> Array:
    for axis, found in zip("TS", allowed.shape[2:]):
        if found not in (1, sizes[axis]):
            raise ValueError(
                f"an explicit mask has {axis}={found}, but the attention has {axis}={sizes[axis]}."
            )
    return allowed
