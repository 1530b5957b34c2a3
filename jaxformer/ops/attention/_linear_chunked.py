"""Causal linear attention in chunks, in plain JAX, with a backward pass of its own.

One loop walks the chunks: inside a chunk it takes the weights, from the chunks before it reads one
state. Chunks are cut from the arrays as they lie and features made of them there, so that next to
nothing is stored but the result; the gradient goes back from the state before each chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention._xla_tiles import spread
from jaxformer.typing import Array


class Options(NamedTuple):
    """What is static of a call.

    Attributes:
        features: φ of queries and of keys; must hold no arrays.
        chunk: Tokens a chunk, a divisor of T.
        quotient: Divides sums by their weight.
    """

    features: Callable[[Array], Array]
    chunk: int
    quotient: Callable[[Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    options: Options, q: Array, k: Array, v: Array, lengths: Array | None, sums: Array
) -> tuple[Array, Array]:
    """Attends to all keys up to one's own.

    Args:
        options: What is static.
        q: B T N H.
        k: B T K H.
        v: B T K Hv.
        lengths: Keys in use of each row, B; all if None.
        sums: Of the keys before: φ(k) times (v, 1), B K F Hv+1.

    Returns:
        B T N Hv with the dtype of `v`, and the sums after the last key.
    """
    return _forward(options, q, k, v, lengths, sums)[0]


def _forward(
    options: Options, q: Array, k: Array, v: Array, lengths: Array | None, sums: Array
) -> tuple[Any, Any]:
    kv_heads, dtype = k.shape[2], sums.dtype
    tokens = jnp.arange(q.shape[1]).reshape(-1, options.chunk)
    past = _past(q.shape[2] // kv_heads, options.chunk)

    def step(carry: Any, tokens: Array) -> tuple[Any, Array]:
        sums, y, weight = carry
        rows, keys, _ = _features(options, q, k, lengths, sums, tokens)
        values = _with_one(_cut(v, tokens, kv_heads).astype(dtype))
        inside = jnp.where(past, jnp.einsum("nrf,nsf->nrs", rows, keys), 0)
        mixed = jnp.einsum("nrs,nsh->nrh", inside, values)
        mixed += jnp.einsum("nrf,nfh->nrh", rows, sums)
        y = _put(y, options.quotient(mixed[..., :-1], mixed[..., -1:]), tokens)
        weight = _put(weight, mixed[..., -1:], tokens)
        return (sums + jnp.einsum("nsf,nsh->nfh", keys, values), y, weight), sums

    flat = sums.reshape(-1, *sums.shape[2:])
    y, weight = jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), jnp.zeros((*q.shape[:3], 1), dtype)
    _, y, weight = spread((q, y, weight))
    (last, y, weight), starts = lax.scan(step, (flat, y, weight), tokens)
    return (y, last.reshape(sums.shape)), (q, k, v, lengths, y, weight, starts)


def _backward(options: Options, saved: Any, gradients: Any) -> Any:
    """Goes from the last chunk to the first; `after` is the gradient of the sums after a chunk."""
    q, k, v, lengths, y, weight, starts = saved
    d_y, d_last = gradients
    kv_heads, dtype = k.shape[2], d_last.dtype
    tokens = jnp.arange(q.shape[1]).reshape(-1, options.chunk)
    past = _past(q.shape[2] // kv_heads, options.chunk)

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        after, d_q, d_k, d_v = carry
        tokens, sums = chunk
        rows, keys, pull = _features(options, q, k, lengths, sums, tokens)
        values = _with_one(_cut(v, tokens, kv_heads).astype(dtype))
        change = _cut(d_y, tokens, kv_heads).astype(dtype)
        change = options.quotient(change, _cut(weight, tokens, kv_heads))
        mean = _cut(y, tokens, kv_heads).astype(dtype)
        for_weight = -jnp.einsum("nrh,nrh->nr", change, mean)[..., None]
        change = jnp.concatenate([change, for_weight], -1)

        inside = jnp.where(past, jnp.einsum("nrf,nsf->nrs", rows, keys), 0)
        for_inside = jnp.where(past, jnp.einsum("nrh,nsh->nrs", change, values), 0)
        for_rows = jnp.einsum("nrs,nsf->nrf", for_inside, keys)
        for_rows += jnp.einsum("nrh,nfh->nrf", change, sums)
        for_keys = jnp.einsum("nrs,nrf->nsf", for_inside, rows)
        for_keys += jnp.einsum("nsh,nfh->nsf", values, after)
        for_values = jnp.einsum("nrs,nrh->nsh", inside, change)
        for_values += jnp.einsum("nsf,nfh->nsh", keys, after)
        for_q, for_k = pull((for_rows, for_keys))
        after = after + jnp.einsum("nrf,nrh->nfh", rows, change)
        d_q, d_k = _put(d_q, for_q, tokens), _put(d_k, for_k, tokens)
        return (after, d_q, d_k, _put(d_v, for_values[..., :-1], tokens)), None

    flat = d_last.reshape(-1, *d_last.shape[2:])
    start = spread((flat, *(jnp.zeros_like(x) for x in (q, k, v))))
    (first, *found), _ = lax.scan(step, start, (tokens, starts), reverse=True)
    return (*found, None, first.reshape(d_last.shape))


attend.defvjp(_forward, _backward)


def _features(
    options: Options, q: Array, k: Array, lengths: Array | None, sums: Array, tokens: Array
) -> tuple[Array, Array, Callable]:
    """Features of the rows and keys of a chunk, n r F and n s F, and their derivative."""
    kv_heads = k.shape[2]

    def features(q: Array, k: Array) -> tuple[Array, Array]:
        rows, keys = (options.features(x.astype(sums.dtype)) for x in (q, k))
        if lengths is not None:
            real = jnp.repeat(tokens[None] < lengths[:, None], kv_heads, 0)
            keys = jnp.where(real[..., None], keys, 0)
        return rows, keys

    (rows, keys), pull = jax.vjp(features, *(_cut(x, tokens, kv_heads) for x in (q, k)))
    return rows, keys, pull


def _cut(x: Array, tokens: Array, kv_heads: int) -> Array:
    """A chunk of B T N C as (b k) (g t) C."""
    x = lax.dynamic_slice_in_dim(x, tokens[0], tokens.size, 1)
    x = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0] * kv_heads, -1, x.shape[4])


def _put(x: Array, tile: Array, tokens: Array) -> Array:
    """Puts a chunk, as `_cut` cuts it, to its place."""
    heads = tile.shape[0] // x.shape[0]
    tile = tile.reshape(x.shape[0], heads, -1, tokens.size, tile.shape[2])
    tile = tile.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], tokens.size, *x.shape[2:])
    return lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), tokens[0], 1)


def _with_one(values: Array) -> Array:
    """One more channel, of ones: its sum is that of the weights."""
    return jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1)


def _past(group: int, chunk: int) -> Array:
    """Which key of a chunk comes no later than which row of queries."""
    return jnp.tile(jnp.tri(chunk, dtype=bool), (group, 1))[None]
