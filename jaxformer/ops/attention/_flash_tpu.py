"""Attention on TPU by Pallas kernels: the forward one, and one for all gradients.

Arguments are canonical ones of `flash.attend`, which owns the rules of differentiation. Both
passes read blocks of queries and keys into vector memory by a list (`_flash_tpu_steps`), in
bfloat16 or float32; float16, which a TPU does not have, is widened. Sizes of blocks come from a
table by chip, head size and dtype, made from static schedules.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.attention import _flash_tpu_backward, _flash_tpu_forward
from jaxformer.ops.attention._flash_tpu_steps import LANES, LOG2E, MOST_STEPS, Cut
from jaxformer.ops.attention._tpu_blocks import TABLE
from jaxformer.ops.attention._xla_tiles import row_delta
from jaxformer.ops.attention.blocks import kinds
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array, Float

_MIB = 1 << 20
_VMEM = {"TPU v7": 56 * _MIB, "TPU v4": 14 * _MIB}
_MOST_VMEM = 100 * _MIB  # of the 128 of v5e and v6e


def refuses(
    q: Any, k: Any, v: Any, mask: Mask | None, *, bias: Any, scale: Any, softcap: Any, sinks: Any
) -> str | None:
    """Says why the kernels cannot do a call, or None; shapes and dtypes are looked at alone."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"the TPU kernel takes float32, bfloat16 and float16, got {name} of {x.dtype}."
    for name, size in (("H", q.shape[3]), ("Hv", v.shape[3])):
        if size > 256:
            return f"the TPU kernel takes head sizes up to 256, got {name}={size}."
    if min(*q.shape, *k.shape, *v.shape) == 0:
        return f"the TPU kernel needs something to do, got q, k, v of {q.shape, k.shape, v.shape}."
    dtype = _dtype(q, k, v)
    sizes = [_sizes(which, q, v, dtype) for which in ("forward", "backward")]
    pairs = max(_pairs(mask, q.shape[1], k.shape[1], cut) for cut in sizes)
    if pairs > MOST_STEPS:
        return f"the TPU kernel lists at most {MOST_STEPS} pairs of blocks, T and S have {pairs}."
    group = q.shape[2] // k.shape[2]
    if not _blocks_at_once(group, q.shape[3], sizes[1]._replace(query=sizes[1].rows), dtype):
        return f"the TPU kernel has too little memory for N/K={group} heads of H={q.shape[3]}."
    return None


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None,
    *,
    bias: Float[Array, "..."] | None,
    scale: float | Float[Array, ""],
    softcap: float | None,
    sinks: Float[Array, "N"] | None,
    interpret: Any = False,
    block_sizes: Cut | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Computes attention, as `dense.attend` means it, and its log-sum-exp.

    Args:
        q: Queries; N a multiple of K.
        k: Keys.
        v: Values.
        mask: Who may look where.
        bias: Added to the logits.
        scale: Factor of the dot products.
        softcap: Bound of the logits before `bias`.
        sinks: Logits of keys without values.
        interpret: As in `pl.pallas_call`: True or `pltpu.InterpretParams()` to run without a TPU.
        block_sizes: In place of those of the table.

    Returns:
        The output in the dtype of `q`; the logarithm of the sum of exponentials of the logits, sink
        included, in float32, -inf for a query that may look nowhere.
    """
    mask = None if mask is None else mask.canonical(q.shape[1], k.shape[1])
    dtype = _dtype(q, k, v)
    cut = _fitted(block_sizes or _sizes("forward", q, v, dtype), q.shape[1], k.shape[1], 16)
    out, lse = _flash_tpu_forward.forward(
        _heads_first(q, dtype),
        _heads_first(k, dtype),
        _heads_first(v, dtype),
        mask,
        bias=_rank4(bias),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        cut=cut,
        vmem=_vmem(),
        interpret=interpret,
    )
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
    *,
    bias: Float[Array, "..."] | None,
    scale: float | Float[Array, ""],
    softcap: float | None,
    sinks: Float[Array, "N"] | None,
    bias_gradient: bool = False,
    interpret: Any = False,
    block_sizes: Cut | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], None]:
    """Pulls cotangents of `out` and `lse` back to q, k and v.

    Args:
        q: As in `forward`, like k, v, mask, bias, scale, softcap and sinks.
        k: Keys.
        v: Values.
        mask: Who may look where.
        out: What `forward` gave.
        lse: Likewise.
        d_out: Gradient of `out`.
        d_lse: Gradient of `lse`.
        bias: Added to the logits.
        scale: Factor of the dot products.
        softcap: Bound of the logits.
        sinks: Logits of keys without values; what they did is in `lse`.
        bias_gradient: Must be False.
        interpret: As in `forward`.
        block_sizes: In place of those of the table.

    Returns:
        Gradients in the dtypes of q, k and v, and None.

    Raises:
        NotImplementedError: If the gradient of the bias is wanted.
    """
    if bias_gradient:
        raise NotImplementedError("the TPU kernels of attention have no gradient towards bias.")
    query_length, key_length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask = None if mask is None else mask.canonical(query_length, key_length)
    dtype = _dtype(q, k, v)
    sizes = block_sizes or _sizes("backward", q, v, dtype)
    cut = _fitted(sizes, query_length, key_length, LANES)

    delta = row_delta(out, d_out, d_lse, jnp.float32)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    rows = jnp.stack([lse, delta], axis=1).transpose(0, 3, 1, 2)  # B N 2 T
    inputs = [_heads_first(x, dtype) for x in (q, k, v, d_out)]

    while cut.query % (2 * cut.rows) == 0 and not _blocks_at_once(group, q.shape[3], cut, dtype):
        cut = cut._replace(query=cut.query // 2)
    blocks = -(-query_length // cut.query)
    each = max(1, _blocks_at_once(group, q.shape[3], cut, dtype))
    parts = [range(start, min(start + each, blocks)) for start in range(0, blocks, each)]
    partial = functools.partial(
        _flash_tpu_backward.backward,
        *inputs[:3],
        mask,
        inputs[3],
        rows,
        bias=_rank4(bias),
        scale=scale,
        softcap=softcap,
        cut=cut,
        vmem=_vmem(),
        dtype=dtype if len(parts) == 1 else jnp.float32,
        interpret=interpret,
    )
    found = [partial(queries=part) for part in parts]
    dq = jnp.concatenate([dq for dq, _, _ in found], axis=2)[:, :, :query_length]
    dk, dv = (functools.reduce(jnp.add, [x[n] for x in found]) for n in (1, 2))
    gradients = [x.swapaxes(1, 2).astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v))]
    return gradients[0], gradients[1], gradients[2], None


def _dtype(*arrays: Any) -> Any:
    """What the kernels compute products in."""
    found = functools.reduce(jnp.promote_types, (x.dtype for x in arrays))
    return jnp.bfloat16 if found == jnp.bfloat16 else jnp.float32


def _heads_first(x: Array, dtype: Any) -> Array:
    return x.swapaxes(1, 2).astype(dtype)


def _rank4(bias: Array | None) -> Array | None:
    if bias is None:
        return None
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return bias if bias.dtype == jnp.bfloat16 else bias.astype(jnp.float32)


def _sizes(which: str, q: Any, v: Any, dtype: Any) -> Cut:
    """The entry of the table that is nearest."""
    chip = TABLE.get(_chip(), TABLE["TPU v5 lite"])
    wanted = max(q.shape[3], v.shape[3])
    itemsize = jnp.dtype(dtype).itemsize
    key = min(
        (key for key in chip if key[0] == which),
        key=lambda key: (key[2] != itemsize, abs(key[1] - wanted)),
    )
    return Cut(*chip[key])


def _pairs(mask: Mask | None, query_length: int, key_length: int, cut: Cut) -> int:
    """How many pairs of blocks are listed: those that the mask leaves, whatever its arrays hold."""
    every = -(-query_length // cut.query) * -(-key_length // cut.key)
    if mask is None or not MOST_STEPS < every <= 16 * MOST_STEPS:
        return every
    listed = []

    def count(mask: Mask) -> None:
        found = kinds(mask, query_length, key_length, cut.query, cut.key, static=True)
        listed.append(int(np.count_nonzero(found)))

    jax.eval_shape(count, mask)
    return listed[0]


def _fitted(cut: Cut, query_length: int, key_length: int, unit: int) -> Cut:
    """Makes blocks no longer than the sequences; queries in a cell are a multiple of `unit`."""
    rows, query = _shrunk(cut.rows, cut.query, query_length, unit)
    columns, key = _shrunk(cut.columns, cut.key, key_length, LANES)
    return Cut(query, key, rows, columns, cut.ahead)


def _shrunk(cell: int, block: int, length: int, unit: int) -> tuple[int, int]:
    if length >= block:
        return cell, block
    if length > cell:
        filled, half = -(-length // cell) * cell, cell // 2
        if half % LANES == 0 and -(-length // half) * half <= 0.75 * filled:
            return _shrunk(half, block, length, unit)
        return cell, filled
    cell = min(-(-length // unit) * unit, cell)
    return cell, cell


def _blocks_at_once(group: int, channels: int, cut: Cut, dtype: Any) -> int:
    """How many blocks of queries have their gradients in vector memory together."""
    lanes = -(-channels // LANES) * LANES
    bytes_each = group * cut.query * (4 * channels + 2 * jnp.dtype(dtype).itemsize * lanes)
    return _vmem() // 2 // bytes_each


def _vmem() -> int:
    return next((size for kind, size in _VMEM.items() if _chip().startswith(kind)), _MOST_VMEM)


def _chip() -> str:
    """The kind of the TPU that is traced for, also where none is present; else empty."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and device.device_kind.startswith("TPU"):
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""
