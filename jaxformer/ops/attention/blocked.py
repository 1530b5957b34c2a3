"""Causal self-attention in query blocks: the fast form on CPU for sequences of hundreds of tokens.

Dense attention on a CPU is bound by passes over the T×S weights and by XLA's transposes around the
products. Here the channels of keys and values come before their positions, so that no product needs
a transpose of anything as large as the weights; each block of queries stops at its last key, which
saves a quarter of the work with two blocks and at most half with many; and the backward pass reuses
the stored weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.ops.attention.dense import check_arguments
from jaxformer.ops.attention.masks import Mask, causal
from jaxformer.typing import Array, Float


def attend_causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None = None,
    *,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    num_blocks: int = 2,
) -> Float[Array, "B T N Hv"]:
    """Mixes the values of each position's past, like `attend` with the mask `causal()`.

    Softmax and products run in float32 (float64 if `q` is), the result has the dtype of `q`. The
    backward pass keeps the weights that the blocks compute, three quarters of B·N·T² floats with
    two blocks: for long sequences that is too much. Has no forward mode.

    Args:
        q: Queries; N must be a multiple of K.
        k: Keys of the same positions.
        v: Values of the same positions.
        mask: `causal()` exactly.
        bias: Not supported.
        scale: Factor on the logits, `H**-0.5` if None.
        softcap: Not supported.
        sinks: Not supported.
        num_blocks: Query blocks; two to four are best, more save work but make smaller products.

    Raises:
        NotImplementedError: For another mask, keys of other positions (S is not T), or anything
            not supported.
        ValueError: If the shapes do not fit together, or there is nothing to cut into blocks.
    """
    if mask != causal():
        raise NotImplementedError(f"attend_causal honours the mask causal() alone, got {mask}.")
    for name, value in (("bias", bias), ("softcap", softcap), ("sinks", sinks)):
        if value is not None:
            raise NotImplementedError(f"attend_causal does not honour {name}.")
    check_arguments(q, k, v)
    batch, length, heads, channels = q.shape
    if k.shape[1] != length:
        raise NotImplementedError(f"attend_causal needs S=T, got T={length}, S={k.shape[1]}.")
    if length < 1 or num_blocks < 1:
        raise ValueError(f"attend_causal cannot cut T={length} into {num_blocks=}.")
    factor = channels**-0.5 if scale is None else scale
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    groups = q.reshape(batch, length, k.shape[2], heads // k.shape[2], channels)
    out: Any = _blocks(num_blocks, groups.astype(dtype) * factor, k.astype(dtype), v.astype(dtype))
    return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(num_blocks: int, q: Array, k: Array, v: Array) -> Array:
    return _forward(num_blocks, q, k, v)[0]


def _forward(num_blocks: int, q: Array, k: Array, v: Array):
    queries = q.transpose(0, 2, 3, 1, 4)  # B K G T H
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)  # B K H S
    shape = queries.shape
    outs, weights = [], []
    for start, end in _bounds(shape[3], num_blocks):
        hidden = jnp.where(jnp.arange(start, end)[:, None] >= jnp.arange(end)[None], 0.0, -jnp.inf)
        logits = jnp.einsum("bkth,bkhs->bkts", _rows(queries, start, end), keys[..., :end])
        logits = logits + jnp.tile(hidden, (shape[2], 1))[None, None]
        exps = jnp.exp(logits - logits.max(-1, keepdims=True))
        total = exps.sum(-1, keepdims=True)
        out = jnp.einsum("bkts,bkhs->bkth", exps, values[..., :end]) / total
        outs.append(out.reshape(*shape[:3], end - start, values.shape[2]))
        weights.append((exps, total))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out, (queries, keys, values, out, weights)


def _backward(num_blocks: int, saved, gradient: Array):
    queries, keys, values, out, weights = saved
    shape = queries.shape
    inner = (gradient * out).sum(-1).transpose(0, 2, 3, 1)[..., None]  # softmax's own, one a row
    gradient = gradient.transpose(0, 2, 3, 1, 4)
    for_queries, for_keys, for_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    for (start, end), (exps, total) in zip(_bounds(shape[3], num_blocks), weights):
        pad = [(0, 0)] * 3 + [(0, shape[3] - end)]
        upstream = _rows(gradient, start, end) / total
        change = jnp.einsum("bkth,bkhs->bkts", upstream, values[..., :end])
        change = exps * (change - _rows(inner, start, end) / total)
        block = jnp.einsum("bkts,bkhs->bkth", change, keys[..., :end])
        for_queries.append(block.reshape(*shape[:3], end - start, shape[4]))
        product = jnp.einsum("bkth,bkts->bkhs", _rows(queries, start, end), change)
        for_keys += jnp.pad(product, pad)
        for_values += jnp.pad(jnp.einsum("bkth,bkts->bkhs", upstream, exps), pad)
    for_q = jnp.concatenate(for_queries, axis=3).transpose(0, 3, 1, 2, 4)
    return for_q, for_keys.transpose(0, 3, 1, 2), for_values.transpose(0, 3, 1, 2)


_blocks.defvjp(_forward, _backward)


def _bounds(length: int, num_blocks: int) -> list[tuple[int, int]]:
    size = -(-length // num_blocks)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(x: Array, start: int, end: int) -> Array:
    """Positions start..end of all G heads that share a key head, as rows: B K G·T H."""
    return x[:, :, :, start:end].reshape(*x.shape[:2], -1, x.shape[4])
