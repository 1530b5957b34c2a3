"""What the loops of `_flash_xla` share: cutting arrays into tiles, and the logits of one tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.ops.attention import blocks
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array

BLOCK = 512  # rows (queries times group), and keys, in a tile
TILE = 1 << 19  # weights computed at once on CPU: 2 MiB, what the cache of a core holds


class Pair(NamedTuple):
    """One step of the walk; or, with a leading axis, all of them."""

    query: Array
    key: Array
    first: Array
    kind: Array


class Tiles:
    """Attention cut into chunks of heads, and each chunk into pairs of blocks.

    A chunk is `batch_part` rows of the batch times `head_part` key heads, numbered along the heads
    first. Arrays by query are B K G T H, those by key B K S H, padded to whole blocks.
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
        block: int | None,
        tile: int | None,
        by: str = "query",
    ) -> None:
        self.batch, self.length, num_heads, _ = q.shape
        self.num_keys, self.heads = k.shape[1:3]
        self.group = num_heads // self.heads
        self.scale, self.softcap = scale, softcap
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.varying = tuple(varying(q))

        block = BLOCK if block is None else block
        self.query_block = _even(self.length, max(block // self.group, 1))
        self.key_block = _even(self.num_keys, block)
        self.padded_length = -(-self.length // self.query_block) * self.query_block
        self.padded_keys = -(-self.num_keys // self.key_block) * self.key_block
        if tile is None:
            tile = TILE if jax.default_backend() == "cpu" else 0
        size = self.group * self.query_block * self.key_block
        wanted = max(tile // size, 1) if tile else self.batch * self.heads
        self.head_part = _divisor(self.heads, wanted)
        self.batch_part = _divisor(self.batch, wanted // self.heads)
        self.head_parts = self.heads // self.head_part
        self.chunks = self.batch // self.batch_part * self.head_parts
        self.size = (self.batch_part, self.head_part, self.group)

        self.walk = blocks.pairs(
            mask, self.length, self.num_keys, self.query_block, self.key_block, by=by
        )
        self.kind, self.kinds = self._kinds()
        if mask is not None:
            mask = mask.canonical(self.length, self.num_keys).map(lambda _, x: self.padded(x))
        self.mask = mask
        self.bias = None if bias is None else self.padded(bias)
        self.q, self.k, self.v = self.by_query(q), self.by_key(k), self.by_key(v)

    # Arrays.

    def by_query(self, x: Array) -> Array:
        """B T N H to B K G T H."""
        x = x.reshape(*x.shape[:2], self.heads, self.group, x.shape[3]).transpose(0, 2, 3, 1, 4)
        return _pad(x, 3, self.padded_length)

    def by_key(self, x: Array) -> Array:
        """B S K H to B K S H."""
        return _pad(x.swapaxes(1, 2), 2, self.padded_keys)

    def from_query(self, x: Array) -> Array:
        """B K G T H to B T N H."""
        x = x[:, :, :, : self.length].transpose(0, 3, 1, 2, 4)
        return x.reshape(self.batch, self.length, -1, x.shape[4])

    def from_key(self, x: Array) -> Array:
        """B K S H to B S K H."""
        return x[:, :, : self.num_keys].swapaxes(1, 2)

    def padded(self, x: Array) -> Array:
        """Pads the axes T and S of #B #N #T #S, unless they have size 1."""
        for axis, size in ((2, self.padded_length), (3, self.padded_keys)):
            x = x if x.shape[axis] == 1 else _pad(x, axis, size)
        return x

    def zeros(self, *shape: int) -> Array:
        """Zeros that vary over the axes of `shard_map` over which the inputs do."""
        zeros = jnp.zeros(shape, self.dtype)
        return lax.pcast(zeros, self.varying, to="varying") if self.varying else zeros

    # The walk.

    def pairs(self, chunk: Array) -> Pair:
        """The pairs of a chunk, in order."""
        kind = self.kind[0] if len(self.kind) == 1 else jnp.asarray(self.kind)[chunk]
        return Pair(*map(jnp.asarray, (self.walk.query, self.walk.key, self.walk.first, kind)))

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

    def over_chunks(self, f: Callable[[Any, Array], tuple[Any, Any]], carry: Any) -> Any:
        """Scans the chunks; joins what each gives to arrays with leading axes B K."""
        if self.chunks == 1:
            return f(carry, jnp.zeros((), jnp.int32))
        carry, parts = lax.scan(f, carry, jnp.arange(self.chunks))
        return carry, jax.tree.map(self._joined, parts)

    def _joined(self, x: Array) -> Array:
        x = x.reshape(-1, self.head_parts, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(self.batch, self.heads, *x.shape[4:])

    def _kinds(self) -> tuple[Any, tuple[int, ...]]:
        """The kind of each pair in each chunk (one row if all are alike), and those there are."""
        kind = self.walk.kind
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

    # Tiles.

    def corner(self, chunk: Array) -> tuple[Array, Array]:
        """The first row of the batch and the first key head of a chunk."""
        return (
            chunk // self.head_parts * self.batch_part,
            chunk % self.head_parts * self.head_part,
        )

    def at_query(self, x: Array, chunk: Array, pair: Pair) -> Array:
        """The queries' tile of B K G T C."""
        start = (*self.corner(chunk), 0, pair.query * self.query_block, 0)
        return lax.dynamic_slice(x, start, (*self.size, self.query_block, x.shape[4]))

    def at_key(self, x: Array, chunk: Array, pair: Pair) -> Array:
        """The keys' tile of B K S C."""
        start = (*self.corner(chunk), pair.key * self.key_block, 0)
        return lax.dynamic_slice(x, start, (*self.size[:2], self.key_block, x.shape[3]))

    def cut(self, x: Array, chunk: Array, pair: Pair) -> Array:
        """The tile of #B #N #T #S, broadcasting to that of the weights."""
        start, size = self._window(x, chunk, pair)
        tile = lax.dynamic_slice(x, start, size)
        heads = (1, 1) if size[1] == 1 else self.size[1:]
        return tile.reshape(size[0], *heads, *size[2:])

    def add(self, x: Array, tile: Array, chunk: Array, pair: Pair) -> Array:
        """Adds a tile of weights to its place in #B #N #T #S, summed over axes of size 1."""
        start, size = self._window(x, chunk, pair)
        tile = tile.reshape(tile.shape[0], -1, *tile.shape[3:])
        axes = tuple(axis for axis in range(4) if size[axis] == 1)
        tile = lax.dynamic_slice(x, start, size) + tile.sum(axes, keepdims=True)
        return lax.dynamic_update_slice(x, tile, start)

    def _window(self, x: Array, chunk: Array, pair: Pair) -> tuple[tuple, tuple[int, ...]]:
        row, head = self.corner(chunk)
        starts = (row, head * self.group, pair.query * self.query_block, pair.key * self.key_block)
        heads = self.head_part * self.group
        sizes = (self.batch_part, heads, self.query_block, self.key_block)
        whole = [n == 1 for n in x.shape]
        return (
            tuple(0 if one else start for one, start in zip(whole, starts)),
            tuple(1 if one else size for one, size in zip(whole, sizes)),
        )

    def logits(self, chunk: Array, pair: Pair, masked: bool) -> tuple[Array, Array, Any]:
        """The logits of a tile, the products they come from, and the slope of the soft-cap."""
        q, k = self.at_query(self.q, chunk, pair), self.at_key(self.k, chunk, pair)
        products = product("bkgth,bksh->bkgts", q, k)
        x, slope = products * self.scale, 1.0
        if self.softcap is not None:
            bent = jnp.tanh(x / self.softcap)
            x, slope = self.softcap * bent, 1 - bent * bent
        if self.bias is not None:
            x = x + self.cut(self.bias, chunk, pair).astype(x.dtype)
        if masked:
            x = jnp.where(self._allowed(chunk, pair), x, -jnp.inf)
        return x, products, slope

    def _allowed(self, chunk: Array, pair: Pair) -> Array:
        i = (pair.query * self.query_block + jnp.arange(self.query_block)).reshape(1, 1, 1, -1, 1)
        j = (pair.key * self.key_block + jnp.arange(self.key_block)).reshape(1, 1, 1, 1, -1)
        allowed = j < self.num_keys
        if self.mask is not None:
            cut = self.mask.map(lambda _, leaf: self.cut(leaf, chunk, pair))
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


def write(x: Array, tile: Array, number: Array, axis: int) -> Array:
    """Puts block `number` along an axis."""
    return lax.dynamic_update_slice_in_dim(x, tile, number * tile.shape[axis], axis)


def finite(level: Array) -> Array:
    """The level to subtract from logits: 0 where it is -inf, since -inf - -inf is no number."""
    return jnp.where(level == -jnp.inf, 0, level)


def _even(length: int, block: int) -> int:
    """The size of blocks, `block` at most, that are as even as can be."""
    return -(-length // -(-length // block))


def _divisor(number: int, limit: int) -> int:
    """The greatest divisor that is at most `limit`, and at least 1."""
    return max((n for n in range(1, number + 1) if number % n == 0 and n <= limit), default=1)


def _pad(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
