"""Attention by its definition: the meaning that every faster implementation is held to."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array, Float


@overload
def attend(*args: Any, return_lse: Literal[False] = False, **kwargs: Any) -> Array: ...
@overload
def attend(*args: Any, return_lse: Literal[True], **kwargs: Any) -> tuple[Array, Array]: ...
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None = None,
    *,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Averages the values at the keys that each query may look at, weighted by how well they match.

    In order: `x = scale * q·k`; `x = softcap * tanh(x / softcap)`; `x = x + bias`; the mask; a
    softmax over S. Query head n reads key head `n // (N / K)`. The softmax is computed in float32
    (float64 if `q` is), the products in the dtype of the inputs with accumulation in float32.

    A query that may look nowhere (by the mask, by `bias = -inf`, or because S is 0) gets zeros, and
    sends zero gradients.

    Args:
        q: Queries; N a multiple of K.
        k: Keys.
        v: Values; their head size may differ from that of `q` and `k`.
        mask: Who may look where; everyone everywhere if None.
        bias: Added to the logits; of rank up to 4, broadcast to B N T S.
        scale: Factor of the dot products; H**-0.5 if None.
        softcap: Bound on the magnitude of logits before `bias`; none if None.
        sinks: A logit for each head of a key without a value: it takes its share of the weight, so
            that the rest sums to less than 1. Neither scaled nor capped.
        return_lse: Also return the logarithm of each row's sum of exponentials, in the dtype of the
            softmax; -inf for a row that may look nowhere.

    Returns:
        An array with the dtype of `q`.

    Raises:
        ValueError: If shapes disagree, N is no multiple of K, or `softcap` is not positive.

    References:
        Vaswani et al. 2017, "Attention is all you need", eq. 1. https://arxiv.org/abs/1706.03762
        Ainslie et al. 2023, "GQA": fewer key heads than query heads. https://arxiv.org/abs/2305.13245
        Gemma Team 2024, "Gemma 2", section 2: softcap. https://arxiv.org/abs/2408.00118
        Xiao et al. 2023, "Efficient streaming language models with attention sinks", eq. 2 with one
        learned logit a head in place of a zero. https://arxiv.org/abs/2309.17453
    """
    check_arguments(q, k, v, bias=bias, softcap=softcap, sinks=sinks)
    batch, length, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    shape = (batch, num_heads, length, num_keys)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    # Heads go before T here, on the small array: else XLA would transpose the T×S one.
    grouped = (num_kv_heads, num_heads // num_kv_heads)
    q_grouped = q.reshape(batch, length, *grouped, head_dim).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("BKGTH,BSKH->BKGTS", q_grouped, k, preferred_element_type=dtype)
    grouped_shape = logits.shape
    logits = logits.reshape(shape) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.reshape((1,) * (4 - bias.ndim) + bias.shape).astype(dtype)
    if mask is not None:
        allowed = mask.dense(length, num_keys)
        check_broadcast("mask", allowed.shape, shape)
        logits = jnp.where(allowed, logits, -jnp.inf)

    sinks = None if sinks is None else sinks.astype(dtype)[None, :, None, None]
    largest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    # The shift cancels in the quotient, so no gradient; -inf - 0 keeps an empty row free of NaN.
    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)[..., 0]
    empty = total == 0
    total = jnp.where(empty, 1, total).transpose(0, 2, 1)[..., None]  # B T N 1

    # Dividing after the product touches T×H numbers rather than T×S.
    weights = weights.reshape(grouped_shape).astype(v.dtype)
    # Straight to BTKGH, XLA on CPU would put the values on the left: half as fast for few queries.
    y = jnp.einsum("BKGTS,BSKH->BKGTH", weights, v, preferred_element_type=dtype)
    y = y.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:3], v.shape[3])
    y = (y / total).astype(q.dtype)
    if not return_lse:
        return y
    lse = jnp.log(total[..., 0]) + largest[..., 0].swapaxes(1, 2)
    return y, jnp.where(empty.swapaxes(1, 2), -jnp.inf, lse)


def weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: Mask | None = None, **options: Any
) -> Float[Array, "B N T S"]:
    """Draws what share of each value `attend` takes, for looking at; T·S numbers a head.

    Args:
        q: Queries.
        k: Keys.
        mask: Who may look where; everyone everywhere if None.
        **options: `bias`, `scale`, `softcap`, `sinks` of `attend`.

    Returns:
        Rows that sum to 1, to less with sinks, and to 0 where there is nowhere to look.
    """
    size = k.shape[1]
    one_hot = jnp.broadcast_to(jnp.eye(size, dtype=q.dtype)[None, :, None], (*k.shape[:3], size))
    return attend(q, k, one_hot, mask, **options).swapaxes(1, 2)


def check_arguments(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> None:
    """Raises a ValueError that names symbol and number where arguments of `attend` disagree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"attend needs {name} of rank 4, got shape {x.shape}.")
    for axis, one, other in (("B", q, k), ("B", q, v), ("S", k, v), ("K", k, v), ("H", q, k)):
        at = {"B": 0, "S": 1, "K": 2, "H": 3}[axis]
        if one.shape[at] != other.shape[at]:
            names = [next(n for n, x in zip("qkv", (q, k, v)) if x is y) for y in (one, other)]
            raise ValueError(
                f"attend: {names[0]} has {axis}={one.shape[at]}, "
                f"{names[1]} has {axis}={other.shape[at]}."
            )
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"attend: N={num_heads} is not a multiple of K={num_kv_heads}.")
    if bias is not None:
        check_broadcast("bias", bias.shape, (q.shape[0], num_heads, q.shape[1], k.shape[1]))
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"attend: sinks have shape {sinks.shape}, expected N={num_heads}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attend needs softcap > 0, got {softcap=}.")


def check_broadcast(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises a ValueError naming the axis in which `found` does not broadcast to B N T S."""
    if len(found) > 4:
        raise ValueError(f"attend: {name} has rank {len(found)}, which exceeds B N T S.")
    for axis, size, wanted in zip("STNB", found[::-1], shape[::-1]):
        if size not in (1, wanted):
            raise ValueError(
                f"attend: {name} has {axis}={size}, the attention has {axis}={wanted}."
            )
