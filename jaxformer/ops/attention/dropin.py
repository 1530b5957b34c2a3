"""`flash.attend` under the signatures of `jax.nn` and of Flax, for models written against those.

For example:

    nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=dropin.attention_fn)
    nnx.MultiHeadAttention(8, 512, attention_fn=dropin.attention_fn, rngs=rngs)
    dropin.dot_product_attention(q, k, v, is_causal=True)  # for jax.nn.dot_product_attention

Numbers are those of the originals, up to rounding, also where a row may look nowhere: the mean of
all values, unlike the zeros of `flash.attend`. What cannot be honoured is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxformer.ops.attention import flash, masks
from jaxformer.typing import Array, Bool, DTypeLike, Float, Shaped

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # jax.nn's logit for what is masked


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Means what `jax.nn.dot_product_attention` means, in memory linear in T and S.

    Args:
        query: B T N H, or without B; all three of one dtype.
        key: B S K H, or without B; N a multiple of K.
        value: Like `key`; another head size is allowed.
        bias: Broadcasts to B N T S.
        mask: Booleans that broadcast to B N T S, True where a query may look.
        scale: Factor of the dot products; H**-0.5 if None.
        is_causal: Query t looks at keys 0 to t.
        query_seq_lengths: int32 of shape B; queries from there on give zeros.
        key_value_seq_lengths: int32 of shape B; keys from there on are hidden.
        local_window_size: Positions to look back and ahead at most; one integer for both.
        implementation: One of `flash.IMPLEMENTATIONS`; "cudnn" is refused.
        return_residual: Also return the logarithm of each row's sum of exponentials, B T N in the
            dtype of `key`, without a gradient.

    Raises:
        ValueError: If shapes or dtypes disagree, or the window is empty.
        NotImplementedError: If `implementation` is "cudnn", or cannot do this call.
    """
    q, k, v = (_rank_4(x) for x in (query, key, value))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"query, key, value have dtypes {q.dtype}, {k.dtype}, {v.dtype}.")
    if implementation == "cudnn":
        raise NotImplementedError("implementation='cudnn' is only in jax.nn itself.")
    rows, columns = (
        _lengths(name, x, q.shape[0])
        for name, x in (
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    )
    formulas: list[masks.Mask] = []
    if mask is not None:
        mask = _rank_4(mask)
        if mask.dtype != bool:
            raise ValueError(f"mask must be boolean, got {mask.dtype}; an additive one is a bias.")
        formulas.append(masks.explicit(mask))
    if local_window_size is not None:
        pair = local_window_size
        formulas.append(masks.window(*((pair, pair) if isinstance(pair, int) else pair)))
    if columns is not None:
        formulas.append(masks.key_lengths(columns))
    may_be_empty = bool(formulas)
    if is_causal:
        formulas.append(masks.causal())
    inside = None
    if rows is not None:
        inside = jnp.arange(q.shape[1])[None] < rows[:, None]
        everywhere = jnp.zeros((q.shape[0], k.shape[1]), jnp.int32)
        formulas.append(masks.segments(jnp.where(inside, 0, 1), everywhere))
    out, lse = _attend(
        q,
        k,
        v,
        _all_of(formulas),
        None if bias is None else _rank_4(bias),
        scale=scale,
        implementation=implementation,
    )
    if may_be_empty:
        out = _mean_where_empty(out, lse, v, inside)
    shape = jnp.shape(query)[:-1]
    out = out.reshape(*shape, v.shape[3])
    if not return_residual:
        return out
    lse = jnp.where(lse == -jnp.inf, _LOWEST, lse)
    return out, lax.stop_gradient(lse.astype(k.dtype).reshape(shape))


def attention_fn(
    query: Shaped[Array, "*B T N H"],
    key: Shaped[Array, "*B S K H"],
    value: Shaped[Array, "*B S K Hv"],
    bias: Float[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    input_positions: Any = None,
) -> Float[Array, "*B T N Hv"]:
    """Means what the `dot_product_attention` of `flax.linen` and of `flax.nnx` means.

    The softmax is in float32 whether or not `force_fp32_for_softmax`, the result has the dtype of
    the computation in either case, and products are at least as precise as `precision` asks for.
    Dropout of weights is not offered.

    Args:
        query: Queries; as the others, with any number of axes before T.
        key: Keys; N a multiple of K.
        value: Values.
        bias: Broadcasts to *B N T S.
        mask: Broadcasts to *B N T S; nonzero where a query may look.
        broadcast_dropout: Without effect, as there is no dropout.
        dropout_rng: Likewise.
        dropout_rate: Must be 0 unless `deterministic`.
        deterministic: No dropout.
        dtype: Of the computation; what the inputs promote to if None.
        precision: A `jax.lax.Precision`, its name, or a pair.
        module: Must be None: there are no weights to sow.
        promote_dtype: Maps (query, key, value) and `dtype` to arrays of one dtype.
        is_causal: Query t looks at keys 0 to t.
        force_fp32_for_softmax: Without effect.
        einsum_dot_general: Must be None.
        qk_attn_weights_einsum: Must be None.
        attn_weights_value_einsum: Must be None.
        input_positions: Must be None; rotate queries and keys before.

    Raises:
        ValueError: If shapes disagree.
        NotImplementedError: If an argument asks for what is not offered; it is named.
    """
    refused = {
        "dropout_rate > 0 with deterministic=False": not deterministic and dropout_rate > 0,
        "module (sow_weights), as no weights are kept": module is not None,
        "einsum_dot_general": einsum_dot_general is not None,
        "qk_attn_weights_einsum": qk_attn_weights_einsum is not None,
        "attn_weights_value_einsum": attn_weights_value_einsum is not None,
        "input_positions": input_positions is not None,
        f"precision={precision}": not _is_precision(precision),
    }
    for argument, found in refused.items():
        if found:
            raise NotImplementedError(f"attention_fn cannot honour {argument}.")
    promote = _promoted if promote_dtype is None else promote_dtype
    query, key, value = promote((query, key, value), dtype=dtype)
    batch = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        if x.shape[:-3] != batch:
            raise ValueError(f"attention_fn: query has B={batch}, {name} has B={x.shape[:-3]}.")
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    formulas: list[masks.Mask] = []
    if mask is not None:
        formulas.append(masks.explicit(_flat(jnp.asarray(mask) != 0, batch)))
    if is_causal:
        formulas.append(masks.causal())
    bias = None if bias is None else _flat(jnp.asarray(bias), batch)
    out, lse = _attend(q, k, v, _all_of(formulas), bias)
    if mask is not None:
        out = _mean_where_empty(out, lse, v, None)
    return out.reshape(*query.shape[:-1], v.shape[3])


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: masks.Mask | None,
    bias: Array | None,
    *,
    scale: float | Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attends, and gives the logarithmic sums as B T N."""
    out, lse = flash.attend(
        q, k, v, mask, bias=bias, scale=scale, implementation=implementation, return_lse=True
    )
    return out, lse


def _mean_where_empty(out: Array, lse: Array, v: Array, inside: Bool[Array, "B T"] | None) -> Array:
    """Puts the mean of the values in rows that may look nowhere: a softmax of equal logits."""
    mean = v.mean(axis=1, keepdims=True, dtype=jnp.promote_types(v.dtype, jnp.float32))
    mean = jnp.repeat(mean.astype(out.dtype), out.shape[2] // v.shape[2], axis=2)
    empty = lse == -jnp.inf
    if inside is not None:
        empty = empty & inside[:, :, None]
    return jnp.where(empty[..., None], mean, out)


def _all_of(formulas: list[masks.Mask]) -> masks.Mask | None:
    joined = None
    for formula in formulas:
        joined = formula if joined is None else joined & formula
    return joined


def _rank_4(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _lengths(name: str, x: ArrayLike | None, batch: int) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (batch,) or x.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32 of shape B={batch}, got {x.dtype} {x.shape}.")
    return x


def _flat(x: Array, batch: tuple[int, ...]) -> Array:
    """Joins the axes before N T S of what broadcasts to *B N T S."""
    rank = len(batch) + 3
    if x.ndim > rank:
        raise ValueError(f"attention_fn: shape {x.shape} exceeds the rank {rank} of *B N T S.")
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if any(size > 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _promoted(arrays: tuple[Array, ...], dtype: DTypeLike | None) -> tuple[Array, ...]:
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _is_precision(precision: Any) -> bool:
    """Whether it is a level, or two, rather than an algorithm that would have to be followed."""
    pair = precision if isinstance(precision, tuple) else (precision,)
    try:
        return all(level is None or lax.Precision(level) is not None for level in pair)
    except (TypeError, ValueError):
        return False
