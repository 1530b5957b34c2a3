"""What the TPU kernels of attention walk along, and how they see masks and biases there.

The third axis of a kernel's grid is a list of steps, one for each pair of blocks that the static
part of the mask leaves. Two integers a step, prefetched into scalar memory, say which blocks it
reads and which body it runs: none, the one without a mask, or one of few with it. A body goes over
the cells of its block; those that the mask empties or fills are known while tracing, so that a
block on the diagonal costs little more than its lower half.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.attention import blocks, masks
from jaxformer.ops.attention.blocks import MASKED, SKIP, WHOLE
from jaxformer.typing import Array

LANES = 128
LOG2E = math.log2(math.e)
MOST_STEPS = 1 << 16  # words of scalar memory for one list
_BODIES = 4  # at most so many with a mask; each adds some thousand instructions
_BITS = 6  # of a step below the number of its moving block: last, first, and four for the body


class Cut(NamedTuple):
    """How a kernel cuts the attention matrix.

    Attributes:
        query: Queries in a block.
        key: Keys in a block.
        rows: Queries in a cell; divides `query`.
        columns: Keys in a cell; divides `key`.
        ahead: Cells whose first products are begun before the last ones of the current cell.
    """

    query: int
    key: int
    rows: int
    columns: int
    ahead: int


class Steps(NamedTuple):
    """The list of a kernel.

    Attributes:
        fixed: The block that stays in place over its run of steps (of queries in the forward
            kernel, of keys in the backward), L.
        code: For each row of kinds and each step, the other block, which moves, and flags; int32.
        rows: How many rows of the batch, and heads, have lists of their own: #B and #N.
        bodies: For each body with a mask, the kind of each cell.
        whole: Whether any step may be WHOLE.
    """

    fixed: np.ndarray
    code: np.ndarray | Array
    rows: tuple[int, int]
    bodies: list[np.ndarray]
    whole: bool

    def of(self, batch: Any, head: Any, step: Any) -> Any:
        """Where in `code` to look."""
        row = (batch * self.rows[1] if self.rows[0] > 1 else 0) + (head if self.rows[1] > 1 else 0)
        return row * len(self.fixed) + step


def moving(code: Any) -> Any:
    """The block that changes from step to step."""
    return code >> _BITS


def is_first(code: Any) -> Any:
    """Whether the fixed block has just come."""
    return (code & 16) != 0


def is_last(code: Any) -> Any:
    """Whether the fixed block is about to go."""
    return (code & 32) != 0


def make(
    mask: masks.Mask | None,
    query_length: int,
    key_length: int,
    cut: Cut,
    *,
    by: str = "query",
    queries: range | None = None,
) -> Steps:
    """Lists the steps of a kernel.

    Args:
        mask: Who may look where, canonical.
        query_length: T.
        key_length: S.
        cut: Sizes of blocks and cells.
        by: "query" or "key": the block that stays in place.
        queries: The blocks of queries to visit; all if None.
    """
    found = blocks.pairs(mask, query_length, key_length, cut.query, cut.key, by=by)
    query, key, kind = found.query, found.key, _few_rows(found.kind)
    ragged = by == "key" and query_length % cut.query > 0
    if ragged:  # the missing queries must not reach the gradients of keys
        kind = _where(kind)(
            (kind == WHOLE) & (query == query_length // cut.query)[None, None], MASKED, kind
        )
    if queries is not None:
        query, key, kind = _restricted(query, key, kind, queries, -(-key_length // cut.key))
    fixed, other = (query, key) if by == "query" else (key, query)

    cells = _cells(mask, query_length, key_length, cut, ragged)[query, key]
    number, bodies = _numbered(cells, np.asarray(_possible(kind)))
    first = np.append(True, np.diff(fixed) != 0)
    last = np.append(first[1:], True)
    body = _where(kind)(kind == MASKED, number[None, None], kind)
    code = (_fetched(other, kind) << _BITS) + (32 * last + 16 * first)[None, None] + body
    whole = bool((body == WHOLE).any()) if isinstance(body, np.ndarray) else True
    rows = (kind.shape[0], kind.shape[1])
    return Steps(fixed, code.reshape(-1).astype(np.int32), rows, bodies, whole)


def run(steps: Steps, cut: Cut, code: Any, body: Callable[[list, np.ndarray], None]) -> None:
    """Runs the body that a step asks for: `body(cells, kinds of all cells)`."""
    shape = (cut.query // cut.rows, cut.key // cut.columns)
    patterns = list(enumerate(steps.bodies, MASKED))
    if steps.whole:
        patterns.append((WHOLE, np.full(shape, WHOLE)))
    for number, pattern in patterns:
        cells = [(int(r), int(c)) for c, r in np.argwhere(pattern.T != SKIP)]
        if cells:
            pl.when((code & 15) == number)(functools.partial(body, cells, pattern))


def interleaved(cells: list, ahead: int, begin: Callable, end: Callable) -> None:
    """Calls `end(cell, begin(cell))` for each cell, `begin` some cells earlier than `end`."""
    begun = [begin(cell) for cell in cells[:ahead]]
    for n, cell in enumerate(cells):
        if n + ahead < len(cells):
            begun.append(begin(cells[n + ahead]))
        end(cell, begun.pop(0))


class Tiles(NamedTuple):
    """Arrays that broadcast to B N T S, as operands of a kernel.

    Attributes:
        arrays: The operands.
        specs: Their blocks.
        load: For each, a function of (reference, row of the batch, slices of queries and of keys
            within the block) that gives the tile of a cell.
    """

    arrays: list[Array]
    specs: list[pl.BlockSpec]
    load: list[Callable[..., Any]]


def tiles(
    leaves: list[tuple[str, Array]],
    query_length: int,
    key_length: int,
    cut: Cut,
    place: Callable[..., tuple],
    *,
    keys_first: bool = False,
) -> Tiles:
    """Prepares leaves of masks, and biases, of shape #B #N #T #S.

    Args:
        leaves: Axes and array of each; "B" gives a scalar in the kernel.
        query_length: T.
        key_length: S.
        cut: Sizes of blocks.
        place: From grid indices and prefetched references to row of the batch, head, block of
            queries and block of keys.
        keys_first: Tiles are S by T, rather than T by S.
    """
    result = Tiles([], [], [])
    for axes, leaf in leaves:
        boolean = leaf.dtype == bool
        if boolean:
            leaf = leaf.astype(jnp.int8 if min(leaf.shape[2:]) > 1 else jnp.int32)
        elif jnp.issubdtype(leaf.dtype, jnp.integer):
            leaf = leaf.astype(jnp.int32)
        if axes == "B":
            result.arrays.append(leaf.reshape(-1))
            result.specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
            many = leaf.shape[0] > 1
            result.load.append(lambda ref, b, rows, columns, many=many: ref[b if many else 0])
            continue
        if leaf.shape[2] == leaf.shape[3] == 1:
            leaf = jnp.broadcast_to(leaf, (*leaf.shape[:3], key_length))
        many = [size > 1 for size in leaf.shape]
        full = leaf.shape[2] > 1 and leaf.shape[3] > 1
        along_queries = leaf.shape[3] == 1 and (leaf.shape[2] > 1 or axes == "BT")
        if full:
            array, spec, load = _full(leaf, cut, place, many, keys_first)
        else:
            array, spec, load = _vector(leaf, cut, place, many, along_queries, keys_first)
        result.arrays.append(array)
        result.specs.append(spec)
        result.load.append(functools.partial(_boolean, load) if boolean else load)
    return result


def _boolean(load: Callable[..., Any], *args: Any) -> Any:
    return load(*args).astype(jnp.int32) != 0


def _full(leaf: Array, cut: Cut, place: Callable, many: list[bool], keys_first: bool):
    shape = (1, 1, cut.key, cut.query) if keys_first else (1, 1, cut.query, cut.key)

    def index(*ids):
        b, n, i, j = place(*ids)
        return (b if many[0] else 0, n if many[1] else 0, *((j, i) if keys_first else (i, j)))

    def load(ref, b, rows, columns):
        return ref[(0, 0, columns, rows) if keys_first else (0, 0, rows, columns)]

    return leaf.swapaxes(2, 3) if keys_first else leaf, pl.BlockSpec(shape, index), load


def _vector(
    leaf: Array, cut: Cut, place: Callable, many: list[bool], along_queries: bool, keys_first: bool
):
    turned = along_queries != keys_first  # a column, which its lanes repeat
    size = cut.query if along_queries else cut.key
    if turned:
        shape = (*leaf.shape[:2], max(leaf.shape[2:]), LANES)
        array = jnp.broadcast_to(leaf.reshape(*shape[:3], 1), shape)
        block = (1, 1, size, LANES)
    else:
        array, size = lane_padded(leaf.reshape(*leaf.shape[:2], 1, -1), size)
        block = (1, 1, 1, size)

    def index(*ids):
        b, n, i, j = place(*ids)
        at = i if along_queries else j
        return b if many[0] else 0, n if many[1] else 0, *((at, 0) if turned else (0, at))

    def load(ref, b, rows, columns):
        down, along = (columns, rows) if keys_first else (rows, columns)
        return spread(ref[0, 0, down], along.stop - along.start) if turned else ref[0, 0, :, along]

    return array, pl.BlockSpec(block, index), load


def lane_padded(array: Array, size: int) -> tuple[Array, int]:
    """Fills the last axis up where one block holds it all, so that blocks are whole lanes."""
    if array.shape[-1] > size:
        return array, size
    size = -(-size // LANES) * LANES
    widths = [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])]
    return jnp.pad(array, widths), size


def spread(lanes: Array, width: int) -> Array:
    """Widens a column that all lanes repeat."""
    if width % LANES == 0:
        return jnp.tile(lanes, (1, width // LANES))
    return lanes[:, :width] if width < LANES else lanes[:, :1]


def results(arrays: list[Array], *kinds: tuple[tuple[int, ...], Any]) -> list:
    """Shapes and dtypes as `pl.pallas_call` takes them: varying over devices as any array does."""
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in kinds]


def part(index: int, size: int) -> slice:
    """The slice of a cell within its block."""
    return slice(index * size, (index + 1) * size)


def scalar(ref: Any, number: Any) -> Any:
    """A number, from scalar memory if it is not known while tracing."""
    return ref[number] if isinstance(number, int) else number


def _few_rows(kind: Any) -> Any:
    """Joins the lists of heads, then of rows, where they would not fit into scalar memory."""
    for axis in (1, 0):
        if math.prod(kind.shape) > MOST_STEPS and kind.shape[axis] > 1:
            low, high = kind.min(axis, keepdims=True), kind.max(axis, keepdims=True)
            every = ((low == WHOLE) & (high == WHOLE)) | (high == SKIP)
            kind = _where(kind)(every, high, MASKED)
    return kind


def _restricted(query: np.ndarray, key: np.ndarray, kind: Any, queries: range, key_blocks: int):
    """Those pairs, by key, whose queries are given, with a skipped one for keys without any."""
    kept = np.flatnonzero((query >= queries.start) & (query < queries.stop))
    absent = np.setdiff1d(np.arange(key_blocks), key[kept])
    order = np.argsort(np.append(key[kept], absent), kind="stable")
    query = np.append(query[kept], np.full_like(absent, queries.start))[order]
    key = np.append(key[kept], absent)[order]
    none = np.full((*kind.shape[:2], len(absent)), SKIP, np.int32)
    numpy = np if isinstance(kind, np.ndarray) else jnp
    kind = numpy.concatenate([kind[:, :, kept], none], axis=2)[:, :, order]
    return query.astype(np.int32), key.astype(np.int32), kind


def _cells(mask: Any, query_length: int, key_length: int, cut: Cut, ragged: bool) -> np.ndarray:
    """What the static part of the mask says of the cells of each block."""
    fine = blocks.kinds(mask, query_length, key_length, cut.rows, cut.columns, static=True)[0, 0]
    fine = fine.copy()
    if ragged and query_length % cut.rows:
        fine[-1] = np.where(fine[-1] == WHOLE, MASKED, fine[-1])
    shape = (-(-query_length // cut.query), -(-key_length // cut.key))
    inside = (cut.query // cut.rows, cut.key // cut.columns)
    widths = [(0, n * m - size) for n, m, size in zip(shape, inside, fine.shape)]
    fine = np.pad(fine, widths, constant_values=SKIP)
    return fine.reshape(shape[0], inside[0], shape[1], inside[1]).swapaxes(1, 2)


def _numbered(cells: np.ndarray, possible: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Gives each step the number of a body that does for its cells; rare ones share the last."""
    number = np.full(len(cells), WHOLE, np.int32)  # where finer blocks have settled it
    possible = possible & (cells != WHOLE).any((1, 2))
    if not possible.any():
        return number, []
    patterns, inverse, counts = np.unique(
        cells[possible].reshape(possible.sum(), -1), axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    number[possible] = MASKED + np.minimum(rank[inverse.reshape(-1)], _BODIES - 1)
    bodies = [patterns[n] for n in order[: _BODIES - 1]]
    rest = patterns[order[_BODIES - 1 :]]
    if len(rest):
        bodies.append(np.where((rest == rest[0]).all(axis=0), rest[0], MASKED))
    return number, [body.reshape(cells.shape[1:]) for body in bodies]


def _possible(kind: Any) -> np.ndarray:
    """Which steps may be MASKED."""
    if isinstance(kind, np.ndarray):
        return (kind == MASKED).any((0, 1))
    return np.ones(kind.shape[2], bool)


def _fetched(other: np.ndarray, kind: Any) -> Any:
    """The moving block of each step; a skipped one already asks for what comes next."""
    length = len(other)
    position = np.arange(length)[None, None]
    ahead = _where(kind)(kind != SKIP, position, length)
    behind = _where(kind)(kind != SKIP, position, 0)
    if isinstance(ahead, np.ndarray) and isinstance(behind, np.ndarray):
        ahead = np.minimum.accumulate(ahead[..., ::-1], axis=2)[..., ::-1]
        behind = np.maximum.accumulate(behind, axis=2)
        return other[np.where(ahead < length, ahead, behind)]
    ahead = jax.lax.cummin(jnp.asarray(ahead), axis=2, reverse=True)
    behind = jax.lax.cummax(jnp.asarray(behind), axis=2)
    return jnp.asarray(other)[jnp.where(ahead < length, ahead, behind)]


def _where(kind: Any) -> Callable[..., Any]:
    return np.where if isinstance(kind, np.ndarray) else jnp.where
