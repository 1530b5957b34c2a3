"""Which blocks of an attention matrix a kernel skips, computes whole, or computes under the mask.

A kernel walks a list of pairs (block of queries, block of keys). What the mask says without its
arrays decides while tracing which pairs there are; what the arrays add is the kind of each pair.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array

SKIP, WHOLE, MASKED = 0, 1, 2
_FAR = np.int64(1 << 40)  # beyond every position and segment


class Pairs(NamedTuple):
    """Blocks to compute, in order, all those of one row (or column) together.

    Attributes:
        query: Number of the block of queries of each pair, L.
        key: Number of the block of keys, L.
        first: Whether the pair is the first of its row (or column), L.
        last: Whether it is the last, L.
        kind: SKIP, WHOLE or MASKED for each pair, int32, of shape #B #N L; NumPy if the mask holds
            no arrays.
    """

    query: np.ndarray
    key: np.ndarray
    first: np.ndarray
    last: np.ndarray
    kind: np.ndarray | Array


def pairs(
    mask: Mask | None,
    query_length: int,
    key_length: int,
    query_block: int,
    key_block: int,
    *,
    by: str = "query",
) -> Pairs:
    """Lists the pairs of blocks in which the mask may let anyone look.

    Each block of queries (of keys if `by` is "key") has one pair at least, a skipped one if need
    be, so that a kernel passes by each to write its result.

    Args:
        mask: Who may look where.
        query_length: T.
        key_length: S.
        query_block: Queries in a block; the last block may be short.
        key_block: Keys in a block; a short last one is MASKED, never WHOLE.
        by: "query" for pairs sorted by query, then key; "key" for the converse.
    """
    sizes = (query_length, key_length, query_block, key_block)
    possible = kinds(mask, *sizes, static=True)[0, 0] != SKIP
    exact = kinds(mask, *sizes)
    grid = possible if by == "query" else possible.T
    grid = grid.copy()
    grid[~grid.any(axis=1), 0] = True
    rows, columns = np.nonzero(grid)
    change = np.diff(rows) != 0
    first, last = np.append(True, change), np.append(change, True)
    query, key = (rows, columns) if by == "query" else (columns, rows)
    query, key = query.astype(np.int32), key.astype(np.int32)
    return Pairs(query, key, first, last, exact[:, :, query, key])


def kinds(
    mask: Mask | None,
    query_length: int,
    key_length: int,
    query_block: int,
    key_block: int,
    *,
    static: bool = False,
) -> Any:
    """Classifies each block: SKIP if nobody may look, WHOLE if everybody may, else MASKED.

    A block is called MASKED where the formula leaves it open. Keys from S on do not exist, so a
    short last block of keys is never WHOLE.

    Args:
        mask: Who may look where.
        query_length: T.
        key_length: S.
        query_block: Queries in a block.
        key_block: Keys in a block.
        static: Disregard what is in the arrays of the mask, so that the answer is NumPy.

    Returns:
        int32 of shape #B #N (blocks of queries) (blocks of keys), NumPy if the mask has no arrays.
    """
    rows, columns = -(-query_length // query_block), -(-key_length // key_block)
    i = _ranges(query_length, query_block).reshape(2, 1, 1, rows, 1)
    j = _ranges(key_length, key_block).reshape(2, 1, 1, 1, columns)
    complete = (j[1] + 1) % key_block == 0
    shape = (1, 1, rows, columns)
    if mask is None:
        return np.where(np.broadcast_to(complete, shape), WHOLE, MASKED).astype(np.int32)
    canonical = mask.canonical(query_length, key_length)

    def ranged(axes: str, leaf: Array) -> tuple[Any, Any]:
        if static:
            return (False, True) if axes == "BNTS" else (-_FAR, _FAR)
        least = _reduced(jnp.min, leaf, query_block, key_block)
        return least, _reduced(jnp.max, leaf, query_block, key_block)

    canonical = canonical.map(ranged)
    every, some = canonical.bounds((i[0], i[1]), (j[0], j[1]))
    numpy = jnp if isinstance(every, jax.Array) or isinstance(some, jax.Array) else np
    every = every & complete
    shape = np.broadcast_shapes(shape, np.shape(every), np.shape(some))
    kind = numpy.where(some, numpy.where(every, WHOLE, MASKED), SKIP).astype(np.int32)
    return numpy.broadcast_to(kind, shape)


def listed(kind: Any) -> tuple[Any, Any]:
    """Lists for each row of blocks those to compute, whole ones first.

    Args:
        kind: SKIP, WHOLE or MASKED, of shape ... (rows) (columns), as `kinds` gives.

    Returns:
        int32 arrays, NumPy if `kind` is: the columns in order, skipped ones last (in NumPy cut to
        the longest list, of one at least); how many are whole and how many masked, ... (rows) 2.
    """
    numpy = np if isinstance(kind, np.ndarray) else jnp
    order = numpy.argsort(numpy.where(kind == SKIP, MASKED + 1, kind), axis=-1, stable=True)
    counts = numpy.stack([(kind == value).sum(-1) for value in (WHOLE, MASKED)], axis=-1)
    if numpy is np:
        order = order[..., : max(counts.sum(-1).max(), 1)]
    return order.astype(np.int32), counts.astype(np.int32)


def _reduced(reduce: Callable[..., Array], x: Array, *block: int) -> Array:
    """Reduces the axes T and S of B N T S by blocks; those of size 1 stay."""
    for axis, size in zip((2, 3), block):
        if x.shape[axis] > 1:
            widths = [(0, 0)] * 4
            widths[axis] = (0, -x.shape[axis] % size)
            x = jnp.pad(x, widths, mode="edge")
            x = reduce(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis=axis + 1)
    return x


def _ranges(length: int, block: int) -> np.ndarray:
    """The first and the last position of each block, shape 2 by blocks."""
    first = np.arange(0, length, block)
    return np.stack([first, np.minimum(first + block, length) - 1])
