"""Attention of the newest queries to a long cache of keys, of which each row has filled a part.

For example, a token at a time, with the new key already written at `lengths - 1`:

    out = decode.attend(q, k_cache, v_cache, lengths)  # q: B 1 N H, the caches: B S K H

Time follows the lengths, not S. Where one query cannot occupy the hardware, the keys are split into
parts that are computed as rows of the batch and joined by their logarithmic sums ("flash-decoding";
Dao, Haziza, Massa and Sizov 2023, https://pytorch.org/blog/flash-decoding/).
"""

import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention import dense, flash, masks
from jaxformer.typing import Array, Float, Int

BLOCK = 512  # keys of a part at least

_ROWS = 128  # of the batch, times key heads, times splits: about the multiprocessors of a GPU


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    splits: int | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Lets the last T of `lengths[b]` positions look at themselves and at everything before.

    Query t stands at position `lengths[b] - T + t`; one at a negative position gives zeros. The
    same as `attention.attend` with `window(window, 0, lengths - T)` as its mask. New lengths do not
    recompile. Differentiable; softmax and joins are in float32.

    Args:
        q: The newest queries, one or a few.
        k: Keys with those of the queries among them. What lies beyond the length must be finite.
        v: Values, likewise.
        lengths: Keys in use of each row, 0 to S.
        window: Positions to look back at most; all if None.
        bias: Added to the logits; broadcasts to B N T S.
        scale: Factor of the dot products; H**-0.5 if None.
        softcap: Bound of the logits before `bias`.
        sinks: A logit for each head of a key without a value.
        splits: Parts of the cache to compute side by side, each result rounded to the dtype of `q`.
            None chooses: 1 on CPU and TPU, whose few cores one part occupies; on GPU the power of
            two that gives each multiprocessor a key head, if it divides S into parts of `BLOCK` or
            more. Other numbers than divisors of S copy the cache.
        implementation: One of `flash.IMPLEMENTATIONS`, or None.
        return_lse: Also return the logarithm of each row's sum of exponentials.

    Raises:
        ValueError: If shapes disagree, or `splits` does not lie in 1..S.
        NotImplementedError: If the implementation asked for cannot do this.
    """
    dense.check_arguments(q, k, v, bias=bias, softcap=softcap, sinks=sinks)
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    if lengths.shape != (batch,):
        raise ValueError(f"attend: lengths have shape {lengths.shape}, expected B={batch}.")
    splits = _splits(batch, *k.shape[1:3]) if splits is None else splits
    if not 1 <= splits <= max(num_keys, 1):
        raise ValueError(f"attend needs 1 <= splits <= S={num_keys}, got {splits=}.")
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)

    def look(q: Array, k: Array, v: Array, offset: Array, bias: Array | None) -> tuple:
        """Attends with query 0 of each row at `offset`, which may lie outside of these keys."""
        mask = masks.window(window, 0, offset)
        options = {"bias": bias, "scale": scale, "softcap": softcap}
        return flash.attend(
            q, k, v, mask, **options, implementation=implementation, return_lse=True
        )

    offset = lengths - num_queries
    if splits == 1:
        out, lse = look(q, k, v, offset, bias)
    else:
        size = -(-num_keys // splits)
        rows = batch * splits
        offset = (offset[:, None] - size * jnp.arange(splits)[None]).reshape(rows)
        k, v = (_split(x, 1, splits, size).reshape(rows, size, *x.shape[2:]) for x in (k, v))
        bias = None if bias is None else _split_bias(bias, batch, splits, size)
        out, lse = look(jnp.repeat(q, splits, 0), k, v, offset, bias)
        out, lse = (x.reshape(batch, splits, *x.shape[1:]) for x in (out, lse))
        out, lse = _joined(out, lse)
    if sinks is not None:
        nothing = jnp.broadcast_to(sinks.astype(lse.dtype), (batch, num_queries, num_heads))
        out, lse = flash.merge((out, lse), (jnp.zeros_like(out), nothing))
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def _joined(
    out: Float[Array, "B P T N Hv"], lse: Float[Array, "B P T N"]
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """What `flash.merge` does, over an axis."""
    top = lse.max(1, keepdims=True)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    shares = jnp.exp(lse - top)
    total = shares.sum(1)
    divisor = jnp.where(total == 0, 1, total)
    mixed = (shares[..., None] * out.astype(shares.dtype)).sum(1) / divisor[..., None]
    return mixed, jnp.where(total == 0, -jnp.inf, jnp.log(divisor) + top[:, 0])


def _split(x: Array, axis: int, splits: int, size: int) -> Array:
    """Cuts an axis in two, of `splits` and `size`, after padding it with zeros."""
    missing = splits * size - x.shape[axis]
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], splits, size, *x.shape[axis + 1 :])


def _split_bias(bias: Array, batch: int, splits: int, size: int) -> Array:
    """#B #N #T #S to the rows of the parts."""
    if bias.shape[3] == 1:
        return bias if bias.shape[0] == 1 else jnp.repeat(bias, splits, 0)
    bias = jnp.broadcast_to(bias, (batch, *bias.shape[1:]))
    bias = jnp.moveaxis(_split(bias, 3, splits, size), 3, 1)
    return bias.reshape(batch * splits, *bias.shape[2:])


def _splits(batch: int, num_keys: int, num_kv_heads: int) -> int:
    splits = 1
    if flash.platform() == "gpu":
        while (
            2 * splits * batch * num_kv_heads <= _ROWS
            and num_keys % (2 * splits) == 0
            and num_keys // (2 * splits) >= BLOCK
        ):
            splits *= 2
    return splits
