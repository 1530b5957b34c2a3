"""Attention on Hopper GPUs: what its kernels cannot do, and what they need prepared.

The kernels are written in Pallas for Mosaic GPU, which lowers them from jax 0.11 on; they are
imported when called. Lengths are padded to whole blocks and head sizes to multiples of 64, with
zeros. Logits are kept in units of log 2, so that an exponential is one instruction. For each block
of queries a list names the blocks of keys to visit: first those that the mask lets through whole,
then those that it cuts; the order of a softmax does not matter.

References:
    Shah et al. 2024, "FlashAttention-3": two groups of warps, one multiplying while the other
    exponentiates, and products of one step beside the softmax of the next.
    https://arxiv.org/abs/2407.08608. We differ in walking lists of blocks, and in two kernels
    without atomic additions for the gradient, which gives the same bits each time.
"""

import math
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.ops.attention import blocks
from jaxformer.ops.attention._xla_tiles import row_delta
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array

_LOG2E = math.log2(math.e)
_LEAST_SCALE = 1e-30  # in place of 0: hidden keys have logits of -inf, and -inf * 0 is NaN
_SHARED_MEMORY = 232_448 - 4096  # bytes a block of threads may have, less room for barriers
_REGISTERS = 192  # of 240 a thread, what accumulators may take


class Tile(NamedTuple):
    """Sizes of blocks.

    Attributes:
        rows: Queries of a group of warps (keys, for the gradient of keys and values): a multiple of
            64. A block of threads has two groups.
        columns: Keys that they meet in a step (or queries): a multiple of 64, since wgmma sums
            over whole swizzled rows (the interpreter takes fewer).
        stages: Steps whose data are on their way at the same time.
        parts: In how many parts the kernel for keys and values multiplies the columns of a step:
            more columns come at a time than fit in its registers.
    """

    rows: int = 64
    columns: int = 128
    stages: int = 2
    parts: int = 1


class Form(NamedTuple):
    """What a kernel is compiled for; `mask` is the tree that its leaves are put back into."""

    tile: Tile
    query_axis: int
    key_length: int
    ragged: bool
    softcap: float | None
    mask: Any


class Inputs(NamedTuple):
    """What a kernel reads; None for what there is not.

    Attributes:
        q: B T N H, T a multiple of two times the rows, H one of 64.
        k: B S K H.
        v: B S K Hv.
        lists: For each block of rows the blocks of columns: #B #N (blocks) (blocks).
        counts: How many of a list are whole, and how many are to be visited: #B #N (blocks) 2.
        scale: |scale| log₂e, shape 1; the sign is with the queries.
        positions: 0, 1, 2, ... of shape 1 1 1 L.
        leaves: Of the mask, #B #N (rows) (columns), axes without influence having size 1.
        bias: Likewise, times log₂e; in a backward without soft-cap over |scale|, as logits are
            before scaling.
        sinks: N, times log₂e.
        d_out: B T N Hv.
        lse: B N T, times log₂e; inf where nobody is seen.
        delta: B N T; d_lse less the product of `out` and `d_out`.
    """

    q: Any
    k: Any
    v: Any
    lists: Any
    counts: Any
    scale: Any
    positions: Any
    leaves: Any
    bias: Any
    sinks: Any = None
    d_out: Any = None
    lse: Any = None
    delta: Any = None


def refuses(
    q: Any, k: Any, v: Any, mask: Any, *, bias: Any, scale: Any, softcap: Any, sinks: Any
) -> str | None:
    """Says why these kernels cannot compute such a call, or None; asks no device.

    Whether there is a Hopper GPU is for the caller to find out.
    """
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU needs jax 0.11 or newer, this is {jax.__version__}"
    dtypes = {name: jnp.dtype(x.dtype).name for name, x in (("q", q), ("k", k), ("v", v))}
    if len(set(dtypes.values())) > 1:
        return f"q, k and v need one dtype, got {dtypes}"
    if dtypes["q"] not in ("bfloat16", "float16"):
        return f"wgmma is not exact in {dtypes['q']}: needs bfloat16 or float16"
    for name, size in (("H", q.shape[3]), ("Hv", v.shape[3])):
        if size > 256:
            return f"head sizes above 256 exceed the registers, got {name}={size}"
    try:
        version = metadata.version("nvidia-cuda-nvcc-cu12")
    except metadata.PackageNotFoundError:
        return None
    if (12, 8) <= tuple(map(int, version.split(".")[:3])) < (12, 9, 86):
        return f"ptxas {version} miscompiles masks (12.9.86 does not)"
    return None


def forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    bias: Array | None,
    scale: float | Array | None,
    softcap: float | None,
    sinks: Array | None,
    tile: Tile | None = None,
) -> tuple[Array, Array]:
    """Attends; also gives the logarithm of the sum of exponentials of each row, B T N."""
    from jaxformer.ops.attention import _flash_gpu_forward as kernel

    length, value_dim = q.shape[1], v.shape[3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    widths = {_width(q.shape[3]), _width(v.shape[3])}
    if widths == {192, 256}:  # beside the queries there is no room for a result of another size
        q, k, v = (_padded(x, x.shape[1], 256) for x in (q, k, v))
    tile = tile or _forward_tile(q.shape[3], v.shape[3])
    form, inputs = _prepared(tile, 0, q, k, v, mask, bias, scale, softcap)
    if sinks is not None:
        inputs = inputs._replace(sinks=sinks.astype(jnp.float32) * _LOG2E)
    out, lse = kernel.attend(form, inputs)
    return out[:, :length, :, :value_dim], lse[:, :, :length].swapaxes(1, 2)


def backward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
    *,
    bias: Array | None,
    scale: float | Array | None,
    softcap: float | None,
    sinks: Array | None,
    bias_gradient: bool = False,
    tile: Tile | None = None,
) -> tuple[Array, Array, Array, None]:
    """Pulls cotangents of `out` and `lse` back to q, k and v.

    Raises:
        NotImplementedError: If a gradient towards the bias is asked for.
    """
    from jaxformer.ops.attention import _flash_gpu_backward as kernels

    if bias_gradient:
        raise NotImplementedError("the GPU kernels of attention have no gradient towards bias.")
    length, key_length, head_dim, value_dim = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    delta = -row_delta(out, d_out, d_lse, jnp.float32)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E)  # who sees nothing weighs nothing

    def derivatives(f: Any, tile: Tile, query_axis: int, **options: Any) -> Any:
        form, inputs = _prepared(tile, query_axis, q, k, v, mask, bias, scale, softcap)
        more = inputs.q.shape[1] - length
        rows = ((0, 0), (0, 0), (0, more))
        inputs = inputs._replace(
            d_out=_padded(d_out, length + more),
            lse=jnp.pad(lse.swapaxes(1, 2), rows, constant_values=jnp.inf),
            delta=jnp.pad(delta.swapaxes(1, 2), rows),
        )
        if bias is not None and softcap is None:
            inputs = inputs._replace(bias=inputs.bias / inputs.scale[0])
        return f(form, inputs, **options)

    sizes = (inner, outer) = (_width(head_dim), _width(value_dim))
    sums = inner // 2 if softcap is None else _REGISTERS - 64  # its slope takes as many as logits
    dq = derivatives(kernels.queries, tile or _backward_tile(*sizes, sums), 0)
    targets = [("k", "v")] if inner + outer <= 256 else [("k",), ("v",)]
    found = []
    for names in targets:
        sums = sum({"k": inner, "v": outer}[name] // 2 for name in names)
        limits = tile or _backward_tile(*sizes, sums, widest=64)
        found += derivatives(kernels.keys_and_values, limits, 1, targets=names)
    dk, dv = found
    dq = _turned(dq[:, :length, :, :head_dim], scale)
    return dq, dk[:, :key_length, :, :head_dim], dv[:, :key_length, :, :value_dim], None


def _prepared(
    tile: Tile,
    query_axis: int,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    bias: Array | None,
    scale: float | Array | None,
    softcap: float | None,
) -> tuple[Form, Inputs]:
    """Pads, and lists the blocks; rows of tiles are queries if `query_axis` is 0, else keys."""
    length, key_length = q.shape[1], k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    blocks_of = (2 * tile.rows, tile.columns)
    query_block, key_block = blocks_of if query_axis == 0 else blocks_of[::-1]
    # Blocks of the backward's two kernels divide each other, so both pad alike.
    padded = {"T": _up(length, 2 * tile.rows), "S": _up(key_length, max(blocks_of))}

    def tiled(x: Array) -> Array:
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        if x.dtype == bool:
            x = x.astype(jnp.int8)
        elif jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.int32)
        sizes = [1 if n == 1 else m for n, m in zip(x.shape[2:], padded.values())]
        x = jnp.pad(x, ((0, 0), (0, 0), *((0, m - n) for n, m in zip(x.shape[2:], sizes))))
        return x if query_axis == 0 else x.swapaxes(2, 3)

    lists, counts = _lists(mask, length, key_length, query_block, key_block, query_axis)
    leaves, tree = jax.tree.flatten(mask)
    form = Form(
        tile=tile,
        query_axis=query_axis,
        key_length=key_length,
        ragged=key_length % key_block > 0,
        softcap=softcap,
        mask=None if mask is None else (tree, tuple(x.dtype == bool for x in leaves)),
    )
    size = jnp.maximum(jnp.abs(jnp.asarray(scale, jnp.float32)), _LEAST_SCALE)
    return form, Inputs(
        q=_turned(_padded(q, padded["T"]), scale),
        k=_padded(k, padded["S"]),
        v=_padded(v, padded["S"]),
        lists=lists,
        counts=counts,
        scale=(size * _LOG2E).reshape(1),
        positions=jnp.arange(max(padded.values()), dtype=jnp.int32).reshape(1, 1, 1, -1),
        leaves=[tiled(x) for x in leaves],
        bias=None if bias is None else tiled(bias.astype(jnp.float32) * _LOG2E),
    )


def _lists(
    mask: Mask | None, length: int, key_length: int, query_block: int, key_block: int, axis: int
) -> tuple[Array, Array]:
    """For each block of rows its blocks of columns, whole ones first, and how many of each."""
    kind = blocks.kinds(mask, length, key_length, query_block, key_block)
    order, counts = blocks.listed(kind if axis == 0 else kind.swapaxes(2, 3))
    whole, visited = counts[..., 0], jnp.maximum(counts.sum(-1), 1)  # each row writes a result
    return jnp.asarray(order), jnp.stack([jnp.asarray(whole), visited], -1)


def _forward_tile(head_dim: int, value_dim: int) -> Tile:
    """The largest step whose logits, and the weights before them, fit beside the result.

    Two stages at least: the keys of a step and the values of the one before are needed together.
    """
    head_dim, value_dim = _width(head_dim), _width(value_dim)
    tile = Tile(columns=128)
    queries = 2 * tile.rows * (head_dim + (value_dim if head_dim != value_dim else 0))
    size = 2 * (queries + tile.stages * tile.columns * (head_dim + value_dim))
    if value_dim // 2 + tile.columns <= _REGISTERS and size <= _SHARED_MEMORY:
        return tile
    return Tile(columns=64)


def _backward_tile(head_dim: int, value_dim: int, sums: int, widest: int = 128) -> Tile:
    """The largest step of which `widest` columns fit beside `sums` registers, with their slopes."""
    for columns in (128, 64):
        tile = Tile(columns=columns, parts=max(columns // widest, 1))
        size = 2 * (2 * tile.rows + tile.stages * columns) * (head_dim + value_dim)
        if sums + columns // tile.parts <= _REGISTERS and size <= _SHARED_MEMORY:
            return tile
    return Tile(columns=64, stages=1)


def _turned(x: Array, scale: float | Array | None) -> Array:
    """Negates x where the scale is negative."""
    if isinstance(scale, jax.Array):
        return jnp.where(scale < 0, -x, x)
    return -x if scale is not None and scale < 0 else x


def _padded(x: Array, length: int, width: int | None = None) -> Array:
    more = (width or _width(x.shape[3])) - x.shape[3]
    widths = [(0, 0), (0, length - x.shape[1]), (0, 0), (0, more)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _width(head_dim: int) -> int:
    return _up(head_dim, 64)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
