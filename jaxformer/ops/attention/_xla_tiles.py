"""What the loops of `_flash_xla` share: the walk over tiles, and cutting arrays into them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.ops.attention import blocks
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array

BLOCK = 512  # rows (queries times group), and keys, in a tile; or twice as many
BIGGER = 0.89  # time for a weight in tiles of twice the side, measured on two cores
TILE = 1 << 19  # weights computed at once on CPU: 2 MiB, what the cache of a core holds


class Place(NamedTuple):
    """Where a tile lies: first row of the batch, first key head, blocks of queries and of keys."""

    row: Array
    head: Array
    query: Array
    key: Array
    kind: Array


class Tiles:
    """Attention cut into chunks of heads, and each chunk into pairs of blocks.

    A chunk is `batch_part` rows of the batch times `head_part` key heads, numbered along the heads
    first. Arrays are B T N H and B S K H, or turned, with channels before positions: B K H G T and
    B K H S. Tiles have three axes, lest XLA copy them to multiply them: n t h and n s h, turned
    n h t and n h s, and of weights n t s; n stands for b k, and t for g t. Nothing is padded: XLA
    moves a tile that would reach beyond the end back; what it then holds twice is masked.
    """

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask | None,
        bias: Array | None,
        scale: float | Array,
        softcap: float | None,
    ) -> None:
        self.batch, self.length, num_heads, _ = q.shape
        self.num_keys, self.heads = k.shape[1:3]
        self.group = num_heads // self.heads
        self.softcap = softcap
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        # The scale goes into the queries, a pass over the weights less, where that rounds nothing
        # to 16 bits.
        early = q.dtype == self.dtype or (isinstance(scale, float) and _exact(scale))
        self.early, self.late = (scale, None) if early else (None, scale)
        self.varying = tuple(varying(q))

        self.query_block, self.key_block = self._block_sizes(mask)
        tile = TILE if jax.default_backend() == "cpu" else 0  # 0: all heads at once
        size = self.group * self.query_block * self.key_block
        wanted = max(tile // size, 1) if tile else self.batch * self.heads
        self.head_part = _divisor(self.heads, wanted)
        self.batch_part = _divisor(self.batch, wanted // self.heads)
        self.head_parts = self.heads // self.head_part
        self.chunks = self.batch // self.batch_part * self.head_parts
        self.size = (self.batch_part, self.head_part, self.group)

        self.pairs = blocks.pairs(
            mask, self.length, self.num_keys, self.query_block, self.key_block
        )
        self.kind, self.kinds = self._kinds()
        self.mask = None if mask is None else mask.canonical(self.length, self.num_keys)
        self.bias = bias

    def _even_blocks(self, block: int) -> tuple[int, int]:
        return _even(self.length, max(block // self.group, 1)), _even(self.num_keys, block)

    def _block_sizes(self, mask: Mask | None) -> tuple[int, int]:
        """Queries and keys in a block: as many as pay, given what the mask empties."""

        def cost(block: int) -> Any:
            query, key = self._even_blocks(block)
            kinds = blocks.kinds(mask, self.length, self.num_keys, query, key, static=True)
            return (kinds != blocks.SKIP).sum() * query * key * (1 if block == BLOCK else BIGGER)

        return self._even_blocks(min((BLOCK, 2 * BLOCK), key=cost))

    # The walk.

    def walk(self, look: Callable[[Any, Place], Any], state: Any) -> Any:
        """Takes the state through all tiles, chunk by chunk."""

        def chunk(state: Any, number: Array) -> tuple[Any, None]:
            row = number // self.head_parts * self.batch_part
            head = number % self.head_parts * self.head_part
            kind = self.kind[0] if len(self.kind) == 1 else jnp.asarray(self.kind)[number]

            def step(state: Any, at: tuple[Array, ...]) -> tuple[Any, None]:
                return look(state, Place(row, head, *at)), None

            pairs = (self.pairs.query, self.pairs.key, kind)
            return lax.scan(step, state, tuple(map(jnp.asarray, pairs)))

        if self.chunks == 1:
            return chunk(state, jnp.zeros((), jnp.int32))[0]
        return lax.scan(chunk, state, jnp.arange(self.chunks))[0]

    def by_kind(self, kind: Array, look: Callable[[bool, Any], Any], state: Any) -> Any:
        """Changes the state by `look(masked, state)`, or leaves it where nobody may look."""
        branches: dict[int, Callable[[Any], Any]] = {
            blocks.SKIP: lambda state: state,
            blocks.WHOLE: lambda state: look(False, state),
            blocks.MASKED: lambda state: look(True, state),
        }
        if len(self.kinds) == 1:
            return branches[self.kinds[0]](state)
        place = np.zeros(3, np.int32)
        place[list(self.kinds)] = np.arange(len(self.kinds))
        return lax.switch(jnp.asarray(place)[kind], [branches[i] for i in self.kinds], state)

    def _kinds(self) -> tuple[Any, tuple[int, ...]]:
        """The kind of each pair in each chunk (one row if all are alike), and those there are."""
        kind = self.pairs.kind
        last = ((self.pairs.query + 1) * self.query_block > self.length)[None, None]
        numpy = np if isinstance(kind, np.ndarray) else jnp
        kind = numpy.where(last & (kind == blocks.WHOLE), blocks.MASKED, kind)
        if kind.shape[:2] != (1, 1):
            shape = (self.batch, self.heads * self.group, kind.shape[2])
            parts = (-1, self.batch_part, self.head_parts, self.head_part * self.group, shape[2])
            kind = jnp.broadcast_to(kind, shape).reshape(parts)
            some, every = (kind != blocks.SKIP).any((1, 3)), (kind == blocks.WHOLE).all((1, 3))
            kind = jnp.where(some, jnp.where(every, blocks.WHOLE, blocks.MASKED), blocks.SKIP)
            kind = kind.astype(jnp.int32).reshape(self.chunks, -1)
        else:
            kind = kind[0]
        if isinstance(kind, np.ndarray):
            return kind, tuple(int(x) for x in np.unique(kind))
        return kind, (blocks.SKIP, blocks.WHOLE, blocks.MASKED)

    # Whole arrays.

    def zeros(self, *shape: int) -> Array:
        """Zeros that vary over the axes of `shard_map` over which the inputs do."""
        zeros = jnp.zeros(shape, self.dtype)
        return lax.pcast(zeros, self.varying, to="varying") if self.varying else zeros

    def turn_queries(self, x: Array) -> Array:
        """B T N H to B K H G T."""
        x = x.reshape(*x.shape[:2], self.heads, self.group, x.shape[3])
        return x.transpose(0, 2, 4, 3, 1)

    def turn_keys(self, x: Array) -> Array:
        """B S K H to B K H S."""
        return x.transpose(0, 2, 3, 1)

    def queries_back(self, x: Array) -> Array:
        """What `turn_queries` turned."""
        x = x.transpose(0, 4, 1, 3, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[4])

    def keys_back(self, x: Array) -> Array:
        """What `turn_keys` turned."""
        return x.transpose(0, 3, 1, 2)

    # Tiles.

    def queries(self, x: Array, at: Place) -> Array:
        """The tile n t h of B T N H."""
        start = (at.row, at.query * self.query_block, at.head * self.group, 0)
        size = (self.batch_part, self.query_block, self.head_part * self.group, x.shape[3])
        tile = lax.dynamic_slice(x, start, size)
        tile = tile.reshape(*tile.shape[:2], *self.size[1:], -1).transpose(0, 2, 3, 1, 4)
        return tile.reshape(-1, self.group * self.query_block, x.shape[3])

    def put_queries(self, x: Array, tile: Array, at: Place) -> Array:
        """Puts what `queries` cut, or its like, back to its place."""
        tile = tile.reshape(*self.size, self.query_block, -1).transpose(0, 3, 1, 2, 4)
        tile = tile.reshape(*tile.shape[:2], -1, x.shape[3])
        start = (at.row, at.query * self.query_block, at.head * self.group, 0)
        return lax.dynamic_update_slice(x, tile, start)

    def keys(self, x: Array, at: Place) -> Array:
        """The tile n s h of B S K H."""
        start = (at.row, at.key * self.key_block, at.head, 0)
        size = (self.batch_part, self.key_block, self.head_part, x.shape[3])
        tile = lax.dynamic_slice(x, start, size)
        return tile.swapaxes(1, 2).reshape(-1, self.key_block, x.shape[3])

    def turned_queries(self, x: Array, at: Place) -> Array:
        """The tile n h t of B K H G T."""
        start = (at.row, at.head, 0, 0, at.query * self.query_block)
        size = (*self.size[:2], x.shape[2], self.group, self.query_block)
        return lax.dynamic_slice(x, start, size).reshape(-1, x.shape[2], size[3] * size[4])

    def add_queries(self, x: Array, tile: Array, at: Place) -> Array:
        """Adds a tile n h t to its place in B K H G T."""
        start = (at.row, at.head, 0, 0, at.query * self.query_block)
        size = (*self.size[:2], x.shape[2], self.group, self.query_block)
        tile = lax.dynamic_slice(x, start, size) + tile.reshape(size)
        return lax.dynamic_update_slice(x, tile, start)

    def turned_keys(self, x: Array, at: Place) -> Array:
        """The tile n h s of B K H S."""
        start = (at.row, at.head, 0, at.key * self.key_block)
        size = (*self.size[:2], x.shape[2], self.key_block)
        return lax.dynamic_slice(x, start, size).reshape(-1, *size[2:])

    def add_keys(self, x: Array, tile: Array, at: Place) -> Array:
        """Adds a tile n h s to its place in B K H S."""
        start = (at.row, at.head, 0, at.key * self.key_block)
        size = (*self.size[:2], x.shape[2], self.key_block)
        tile = lax.dynamic_slice(x, start, size) + tile.reshape(size)
        return lax.dynamic_update_slice(x, tile, start)

    def scaled(self, queries: Array) -> Array:
        """Queries times the scale, unless that is left to the logits."""
        return queries if self.early is None else queries * self.early

    def logits(self, products: Array, at: Place, masked: bool) -> tuple[Array, Any]:
        """The logits of a tile, n t s, from its products; and the slope of the soft-cap."""
        x, slope = products, 1.0
        if self.late is not None:
            x = x * self.late
        if self.softcap is not None:
            bent = jnp.tanh(x / self.softcap)
            x, slope = self.softcap * bent, 1 - bent * bent
        if self.bias is not None:
            x = self.plus(x, self.bias, at)
        if masked:
            allowed, spread = self._allowed(at), self._spread(x)
            x = jnp.where(allowed, spread, -jnp.inf).reshape(x.shape)
        return x, slope

    def plus(self, tile: Array, x: Array, at: Place) -> Array:
        """A tile of weights plus that of #B #N #T #S."""
        return (self._spread(tile) + self._cut(x, at).astype(tile.dtype)).reshape(tile.shape)

    def add_weights(self, x: Array, tile: Array, at: Place) -> Array:
        """Adds a tile of weights to its place in #B #N #T #S, summed over axes of size 1."""
        start, size = self._window(x, at)
        tile = tile.reshape(self.batch_part, -1, self.query_block, self.key_block)
        axes = tuple(axis for axis in range(4) if size[axis] == 1)
        tile = lax.dynamic_slice(x, start, size) + tile.sum(axes, keepdims=True)
        return lax.dynamic_update_slice(x, tile, start)

    def _spread(self, tile: Array) -> Array:
        """n t s to b k g t s."""
        return tile.reshape(*self.size, self.query_block, self.key_block)

    def _cut(self, x: Array, at: Place) -> Array:
        """The tile of #B #N #T #S, broadcasting to b k g t s."""
        start, size = self._window(x, at)
        tile = lax.dynamic_slice(x, start, size)
        heads = (1, 1) if size[1] == 1 else self.size[1:]
        return tile.reshape(size[0], *heads, *size[2:])

    def _window(self, x: Array, at: Place) -> tuple[tuple, tuple[int, ...]]:
        starts = (
            at.row,
            at.head * self.group,
            at.query * self.query_block,
            at.key * self.key_block,
        )
        heads = self.head_part * self.group
        sizes = (self.batch_part, heads, self.query_block, self.key_block)
        whole = [n == 1 for n in x.shape]
        return (
            tuple(0 if one else start for one, start in zip(whole, starts)),
            tuple(1 if one else size for one, size in zip(whole, sizes)),
        )

    def _allowed(self, at: Place) -> Array:
        i, query = _positions(at.query, self.query_block, self.length)
        j, key = _positions(at.key, self.key_block, self.num_keys)
        i, j = i.reshape(1, 1, 1, -1, 1), j.reshape(1, 1, 1, 1, -1)
        allowed = (i >= query) & (j >= key)
        if self.mask is not None:
            cut = self.mask.map(lambda _, leaf: self._cut(leaf, at))
            allowed = allowed & cut.tile(i, j)
        return allowed


def product(equation: str, a: Array, b: Array) -> Array:
    """An einsum accumulated in float32; narrow factors are widened on CPU, where that is fastest.

    Elsewhere a float32 factor beside a narrow one is rounded to it.
    """
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    narrow = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a.astype(wide), b.astype(wide), precision="highest")

    def as_is(a: Array, b: Array) -> Array:
        a, b = a.astype(narrow), b.astype(narrow)
        return jnp.einsum(equation, a, b, preferred_element_type=wide)

    if narrow.itemsize >= 4:
        return widened(a, b)
    return lax.platform_dependent(a, b, cpu=widened, default=as_is)


def varying(x: Array) -> frozenset[str]:
    """The axes of `shard_map` over which an array differs between devices."""
    return frozenset(jax.typeof(x).mat.varying)


def spread(tree: Any) -> Any:
    """Lets all arrays vary over the axes of `shard_map` over which one of them does."""
    axes = frozenset().union(*map(varying, jax.tree.leaves(tree)))

    def one(x: Array) -> Array:
        missing = tuple(axes - varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def finite(level: Array) -> Array:
    """The level to subtract from logits: 0 where it is -inf, since -inf - -inf is no number."""
    return jnp.where(level == -jnp.inf, 0, level)


def row_delta(out: Array, d_out: Array, d_lse: Array, dtype: Any) -> Array:
    """What the softmax takes off the slopes of each row's logits, B T N: `out·d_out - d_lse`.

    As a product: the plain sum of products takes XLA ten times as long on CPU.
    """
    rows = (x.astype(dtype) for x in (d_out, out))
    return jnp.einsum("btnh,btnh->btn", *rows, precision="highest") - d_lse.astype(dtype)


def _positions(number: Array, block: int, length: int) -> tuple[Array, Array]:
    """The positions that the tile of a block holds, and the first that belongs to the block."""
    first = number * block
    return jnp.minimum(first, length - block) + jnp.arange(block), first


def _exact(scale: float) -> bool:
    """Whether a product with the scale rounds nothing: it is a power of two."""
    return abs(math.frexp(scale)[0]) == 0.5


def _even(length: int, block: int) -> int:
    """The size of blocks, `block` at most, that are as even as can be."""
    return -(-length // -(-length // block))


def _divisor(number: int, limit: int) -> int:
    """The greatest divisor that is at most `limit`, and at least 1."""
    return max((n for n in range(1, number + 1) if number % n == 0 and n <= limit), default=1)
