"""Attention in blocks, in plain JAX: linear memory on every platform, made for CPU.

One loop walks the pairs (block of queries, block of keys) that the mask does not empty, for a few
heads at a time, so that a tile of weights stays in the cache of a core. The softmax is taken as one
goes along (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1); the gradient recomputes the
weights from their logarithmic sum. Besides both stands the tangent, for forward mode.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention._xla_tiles import Place, Tiles, finite, product, row_delta
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array


class Gradients(NamedTuple):
    """Derivatives of a scalar; None where none was asked for."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    scale: Array | None


def refuses(q: Any, k: Any, v: Any, mask: Any, *, bias: Any, scale: Any, softcap: Any, sinks: Any):
    """Refuses nothing."""
    return None


def forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    bias: Array | None,
    scale: float | Array,
    softcap: float | None,
    sinks: Array | None,
) -> tuple[Array, Array]:
    """Attends; also gives the logarithm of the sum of exponentials of each row, B T N.

    Both are float32 (float64 if `q` is): gradients from a rounded result would be less exact.

    Args:
        q: B T N H.
        k: B S K H.
        v: B S K Hv.
        mask: Who may look where.
        bias: Of rank 4, broadcasts to B N T S.
        scale: Factor of the logits.
        softcap: Bound of the logits.
        sinks: N logits.
    """
    tiles = Tiles(q, k, v, mask, bias, scale, softcap)

    def step(state: Any, at: Place) -> Any:
        def look(masked: bool, state: Any) -> Any:
            top, total, mixed = state
            products = product(
                "nth,nsh->nts", tiles.scaled(tiles.queries(q, at)), tiles.keys(k, at)
            )
            x, _ = tiles.logits(products, at, masked)
            higher = jnp.maximum(top, x.max(-1, keepdims=True))
            weights, fade = jnp.exp(x - finite(higher)), jnp.exp(top - finite(higher))
            mixed = mixed * fade + product("nts,nsh->nth", weights, tiles.keys(v, at))
            return higher, total * fade + weights.sum(-1, keepdims=True), mixed

        old = tuple(tiles.queries(x, at) for x in state)
        new = tiles.by_kind(at.kind, look, old)
        return tuple(tiles.put_queries(x, y, at) for x, y in zip(state, new))

    total = tiles.zeros(*q.shape[:3], 1)
    top = total - jnp.inf
    if sinks is not None:
        top, total = total + sinks.astype(tiles.dtype)[None, None, :, None], total + 1
    top, total, mixed = tiles.walk(step, (top, total, tiles.zeros(*q.shape[:3], v.shape[3])))
    out = mixed / jnp.where(total == 0, 1, total)
    return out, (finite(top) + jnp.log(total))[..., 0]


def tangent(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    out: Array,
    lse: Array,
    tangents: dict[str, Array | None],
    *,
    bias: Array | None,
    scale: float | Array,
    softcap: float | None,
    sinks: Array | None,
) -> tuple[Array, Array]:
    """Pushes tangents of q, k, v, bias, scale and sinks (or None) through, linearly.

    Returns:
        The tangents of `out` and `lse`.
    """
    tiles = Tiles(q, k, v, mask, bias, scale, softcap)
    dtype = tiles.dtype
    t_q, t_k, t_v, t_bias, t_scale = map(tangents.get, ("q", "k", "v", "bias", "scale"))
    if t_q is not None:
        t_q = t_q.astype(dtype) * scale
    if t_scale is not None:
        t_q = (0 if t_q is None else t_q) + q.astype(dtype) * t_scale.astype(dtype)
    levels = finite(lse)[..., None]

    def step(sums: Any, at: Place) -> Any:
        def look(masked: bool, sums: Any) -> Any:
            change, mixed = sums
            queries, keys = tiles.scaled(tiles.queries(q, at)), tiles.keys(k, at)
            x, slope = tiles.logits(product("nth,nsh->nts", queries, keys), at, masked)
            weights = jnp.exp(x - tiles.queries(levels, at))
            d_x = jnp.zeros_like(x)
            if t_k is not None:
                d_x += product("nth,nsh->nts", queries, tiles.keys(t_k, at))
                d_x = d_x if tiles.late is None else d_x * tiles.late
            if t_q is not None:
                d_x += product("nth,nsh->nts", tiles.queries(t_q, at), keys)
            d_x *= slope
            if t_bias is not None:
                d_x = tiles.plus(d_x, t_bias, at)
            weighted = jnp.where(weights > 0, weights * d_x, 0)
            mixed = mixed + product("nts,nsh->nth", weighted, tiles.keys(v, at))
            if t_v is not None:
                mixed = mixed + product("nts,nsh->nth", weights, tiles.keys(t_v, at))
            return change + weighted.sum(-1, keepdims=True), mixed

        old = tuple(tiles.queries(x, at) for x in sums)
        new = tiles.by_kind(at.kind, look, old)
        return tuple(tiles.put_queries(x, y, at) for x, y in zip(sums, new))

    start = tuple(tiles.zeros(*q.shape[:3], n) for n in (1, v.shape[3]))
    d_lse, d_out = tiles.walk(step, start)
    d_lse = d_lse[..., 0]
    if sinks is not None and tangents["sinks"] is not None:
        share = jnp.exp(sinks.astype(dtype)[None, None] - finite(lse))
        d_lse = d_lse + share * tangents["sinks"].astype(dtype)[None, None]
    d_out = d_out - d_lse[..., None] * out.astype(dtype)
    return d_out.astype(out.dtype), d_lse


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
    scale: float | Array,
    softcap: float | None,
    sinks: Array | None,
    bias_gradient: bool = False,
    scale_gradient: bool = False,
) -> Gradients:
    """Pulls cotangents of `out` and `lse` back to q, k, v, and on demand to bias and scale."""
    tiles = Tiles(q, k, v, mask, bias, scale, softcap)
    dtype = tiles.dtype
    levels = finite(lse)[..., None]
    delta = row_delta(out, d_out, d_lse, dtype)[..., None]
    turned_q, upstream = tiles.turn_queries(q), tiles.turn_queries(d_out)
    turned_k, turned_v = tiles.turn_keys(k), tiles.turn_keys(v)

    def step(carry: Any, at: Place) -> Any:
        def look(masked: bool, carry: Any) -> Any:
            _, d_bias = carry
            queries = tiles.scaled(tiles.turned_queries(turned_q, at))
            rows = tiles.turned_queries(upstream, at)
            keys, values = tiles.turned_keys(turned_k, at), tiles.turned_keys(turned_v, at)
            x, slope = tiles.logits(product("nht,nhs->nts", queries, keys), at, masked)
            weights = jnp.exp(x - tiles.queries(levels, at))
            d_x = product("nht,nhs->nts", rows, values)
            d_x = weights * (d_x - tiles.queries(delta, at))
            if d_bias is not None:
                d_bias = tiles.add_weights(d_bias, d_x, at)
            d_x = d_x * slope
            for_queries = product("nhs,nts->nht", keys, d_x)
            for_keys = product("nht,nts->nhs", queries, d_x)
            for_values = product("nht,nts->nhs", rows, weights)
            return (for_queries, for_keys, for_values), d_bias

        d_q, d_k, d_v, d_bias = carry
        n, rows = math.prod(tiles.size[:2]), tiles.group * tiles.query_block
        nothing = (
            tiles.zeros(n, q.shape[3], rows),
            tiles.zeros(n, k.shape[3], tiles.key_block),
            tiles.zeros(n, v.shape[3], tiles.key_block),
        )
        (more_q, more_k, more_v), d_bias = tiles.by_kind(at.kind, look, (nothing, d_bias))
        d_q = tiles.add_queries(d_q, more_q, at)
        return d_q, tiles.add_keys(d_k, more_k, at), tiles.add_keys(d_v, more_v, at), d_bias

    start = tuple(tiles.zeros(*x.shape) for x in (turned_q, turned_k, turned_v))
    d_bias = tiles.zeros(*bias.shape) if bias is not None and bias_gradient else None
    d_q, d_k, d_v, d_bias = tiles.walk(step, (*start, d_bias))
    d_q, d_k, d_v = tiles.queries_back(d_q), tiles.keys_back(d_k), tiles.keys_back(d_v)
    d_scale = None
    if scale_gradient:  # in steps, which round less; XLA would make them one
        sums = jnp.einsum("btnh,btnh->btn", q.astype(dtype), d_q, precision="highest")
        for axis in (1, 1):
            sums = lax.optimization_barrier(sums).sum(axis)
        d_scale = lax.optimization_barrier(sums).sum()
    d_q = d_q * scale
    d_k = d_k if tiles.late is None else d_k * tiles.late
    return Gradients(d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_bias, d_scale)
