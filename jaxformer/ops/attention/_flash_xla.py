"""Attention in blocks, in plain JAX: linear memory on every platform, made for CPU.

One loop walks the pairs (block of queries, block of keys) that the mask does not empty, for a few
heads at a time, so that a tile of weights stays in the cache of a core. The softmax is taken as one
goes along (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1); the gradient recomputes the
weights from their logarithmic sum. Besides both stands the tangent, for forward mode.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention._xla_tiles import Pair, Tiles, finite, product, write
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
    block: int | None = None,
    tile: int | None = None,
) -> tuple[Array, Array]:
    """Attends; also gives the logarithm of the sum of exponentials of each row, B T N.

    Args:
        q: B T N H.
        k: B S K H.
        v: B S K Hv.
        mask: Who may look where.
        bias: Of rank 4, broadcasts to B N T S.
        scale: Factor of the logits.
        softcap: Bound of the logits.
        sinks: N logits.
        block: Keys, and queries times group, in a tile at most.
        tile: Weights to compute at once on the way; for all heads if 0, by the platform if None.
    """
    tiles = Tiles(q, k, v, mask, bias, scale, softcap, block, tile)
    dtype = tiles.dtype

    def chunk(carry: None, where: Array) -> tuple[None, Any]:
        rows = (*tiles.size, tiles.query_block)
        total = tiles.zeros(*rows, 1)
        start = (total - jnp.inf, total, tiles.zeros(*rows, v.shape[3]))
        if sinks is not None:
            logits = sinks.astype(dtype).reshape(1, tiles.heads, tiles.group, 1, 1)
            part = lax.dynamic_slice_in_dim(logits, tiles.corner(where)[1], tiles.head_part, 1)
            start = (total + part, total + 1, start[2])

        def step(carry: Any, pair: Pair) -> tuple[Any, None]:
            state, out, lse = carry
            state = jax.tree.map(lambda new, old: jnp.where(pair.first, new, old), start, state)

            def look(masked: bool, state: Any) -> Any:
                top, total, mixed = state
                x, _, _ = tiles.logits(where, pair, masked)
                higher = jnp.maximum(top, x.max(-1, keepdims=True))
                weights, fade = jnp.exp(x - finite(higher)), jnp.exp(top - finite(higher))
                values = tiles.at_key(tiles.v, where, pair)
                mixed = mixed * fade + product("bkgts,bksh->bkgth", weights, values)
                return higher, total * fade + weights.sum(-1, keepdims=True), mixed

            state = tiles.by_kind(pair.kind, look, state)
            top, total, mixed = state
            out = write(out, mixed / jnp.where(total == 0, 1, total), pair.query, 3)
            lse = write(lse, finite(top) + jnp.log(total), pair.query, 3)
            return (state, out, lse), None

        out = tiles.zeros(*tiles.size, tiles.padded_length, v.shape[3])
        lse = tiles.zeros(*tiles.size, tiles.padded_length, 1)
        (_, out, lse), _ = lax.scan(step, (start, out, lse), tiles.pairs(where))
        return carry, (out, lse)

    _, (out, lse) = tiles.over_chunks(chunk, None)
    return tiles.from_query(out).astype(q.dtype), tiles.from_query(lse)[..., 0]


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
    block: int | None = None,
    tile: int | None = None,
) -> tuple[Array, Array]:
    """Pushes tangents of q, k, v, bias, scale and sinks (or None) through, linearly.

    Returns:
        The tangents of `out` and `lse`.
    """
    tiles = Tiles(q, k, v, mask, bias, scale, softcap, block, tile)
    dtype = tiles.dtype
    t_q = None if tangents["q"] is None else tiles.by_query(tangents["q"])
    t_k, t_v = (None if x is None else tiles.by_key(x) for x in map(tangents.get, "kv"))
    t_bias = None if tangents["bias"] is None else tiles.padded(tangents["bias"])
    t_scale = tangents["scale"]
    lse_rows = tiles.by_query(lse[..., None])

    def chunk(carry: None, where: Array) -> tuple[None, Any]:
        rows = (*tiles.size, tiles.query_block)
        start = tiles.zeros(*rows, 1), tiles.zeros(*rows, v.shape[3])

        def step(carry: Any, pair: Pair) -> tuple[Any, None]:
            state, d_lse, d_out = carry
            state = jax.tree.map(lambda new, old: jnp.where(pair.first, new, old), start, state)

            def look(masked: bool, state: Any) -> Any:
                change, mixed = state
                x, products, slope = tiles.logits(where, pair, masked)
                weights = jnp.exp(x - finite(tiles.at_query(lse_rows, where, pair)))
                d_products = jnp.zeros_like(x)
                if t_q is not None:
                    row, keys = (t_q, tiles.k)
                    d_products += logits_of(row, keys, where, pair)
                if t_k is not None:
                    d_products += logits_of(tiles.q, t_k, where, pair)
                d_x = d_products * scale
                if t_scale is not None:
                    d_x += products * t_scale.astype(dtype)
                d_x *= slope
                if t_bias is not None:
                    d_x += tiles.cut(t_bias, where, pair).astype(dtype)
                weighted = jnp.where(weights > 0, weights * d_x, 0)
                values = tiles.at_key(tiles.v, where, pair)
                mixed = mixed + product("bkgts,bksh->bkgth", weighted, values)
                if t_v is not None:
                    d_v = tiles.at_key(t_v, where, pair)
                    mixed = mixed + product("bkgts,bksh->bkgth", weights, d_v)
                return change + weighted.sum(-1, keepdims=True), mixed

            state = tiles.by_kind(pair.kind, look, state)
            d_lse, d_out = (write(x, y, pair.query, 3) for x, y in zip((d_lse, d_out), state))
            return (state, d_lse, d_out), None

        sums = tuple(tiles.zeros(*tiles.size, tiles.padded_length, n) for n in (1, v.shape[3]))
        (_, *sums), _ = lax.scan(step, (start, *sums), tiles.pairs(where))
        return carry, tuple(sums)

    def logits_of(rows: Array, keys: Array, where: Array, pair: Pair) -> Array:
        one, other = tiles.at_query(rows, where, pair), tiles.at_key(keys, where, pair)
        return product("bkgth,bksh->bkgts", one, other)

    _, (d_lse, d_out) = tiles.over_chunks(chunk, None)
    d_lse, d_out = tiles.from_query(d_lse)[..., 0], tiles.from_query(d_out)
    if sinks is not None and tangents["sinks"] is not None:
        share = jnp.exp(sinks.astype(dtype)[None, None] - finite(lse))
        d_lse = d_lse + share * tangents["sinks"].astype(dtype)[None, None]
    d_out = d_out - d_lse[..., None] * out.astype(dtype)
    return d_out.astype(q.dtype), d_lse


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
    block: int | None = None,
    tile: int | None = None,
) -> Gradients:
    """Pulls cotangents of `out` and `lse` back to q, k, v, and on demand to bias and scale."""
    tiles = Tiles(q, k, v, mask, bias, scale, softcap, block, tile, by="key")
    dtype = tiles.dtype
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse.astype(dtype)
    d_rows, lse_rows, delta_rows = (
        tiles.by_query(x) for x in (d_out, lse[..., None], delta[..., None])
    )

    def chunk(sums: Any, where: Array) -> tuple[Any, Any]:
        size = tiles.size[:2]
        # Channels before keys, so that no product has to transpose a tile of weights.
        start = tuple(tiles.zeros(*size, x.shape[3], tiles.key_block) for x in (k, v))

        def step(carry: Any, pair: Pair) -> tuple[Any, None]:
            state, d_k, d_v, d_q, sums = carry
            state = jax.tree.map(lambda new, old: jnp.where(pair.first, new, old), start, state)

            def look(masked: bool, carry: Any) -> Any:
                (for_keys, for_values), _, (d_bias, d_scale) = carry
                x, products, slope = tiles.logits(where, pair, masked)
                weights = jnp.exp(x - finite(tiles.at_query(lse_rows, where, pair)))
                upstream = tiles.at_query(d_rows, where, pair)
                values = tiles.at_key(tiles.v, where, pair)
                d_x = product("bkgth,bksh->bkgts", upstream, values)
                d_x = weights * (d_x - tiles.at_query(delta_rows, where, pair))
                if d_bias is not None:
                    d_bias = tiles.add(d_bias, d_x, where, pair)
                d_x = d_x * slope
                if d_scale is not None:
                    d_scale = d_scale + (products * d_x).sum()
                queries = tiles.at_query(tiles.q, where, pair)
                keys = tiles.at_key(tiles.k, where, pair)
                for_values = for_values + product("bkgth,bkgts->bkhs", upstream, weights)
                for_keys = for_keys + product("bkgth,bkgts->bkhs", queries, d_x)
                more = product("bkgts,bksh->bkgth", d_x, keys)
                return (for_keys, for_values), more, (d_bias, d_scale)

            nothing = tiles.zeros(*tiles.size, tiles.query_block, q.shape[3])
            state, more, sums = tiles.by_kind(pair.kind, look, (state, nothing, sums))
            at = pair.query * tiles.query_block
            more = more + lax.dynamic_slice_in_dim(d_q, at, tiles.query_block, 3)
            d_q = lax.dynamic_update_slice_in_dim(d_q, more, at, 3)
            d_k, d_v = (write(x, y, pair.key, 3) for x, y in zip((d_k, d_v), state))
            return (state, d_k, d_v, d_q, sums), None

        d_q = tiles.zeros(*tiles.size, tiles.padded_length, q.shape[3])
        d_k, d_v = (tiles.zeros(*size, x.shape[3], tiles.padded_keys) for x in (k, v))
        carry, _ = lax.scan(step, (start, d_k, d_v, d_q, sums), tiles.pairs(where))
        _, d_k, d_v, d_q, sums = carry
        return sums, (d_q, d_k.swapaxes(2, 3), d_v.swapaxes(2, 3))

    sums = (
        tiles.zeros(*tiles.bias.shape) if tiles.bias is not None and bias_gradient else None,
        tiles.zeros() if scale_gradient else None,
    )
    (d_bias, d_scale), (d_q, d_k, d_v) = tiles.over_chunks(chunk, sums)
    if bias is not None and d_bias is not None:
        d_bias = d_bias[tuple(map(slice, bias.shape))]
    factor = jnp.asarray(scale, dtype)
    d_q, d_k = tiles.from_query(d_q) * factor, tiles.from_key(d_k) * factor
    d_v = tiles.from_key(d_v)
    return Gradients(d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_bias, d_scale)
