"""Norms over the last axis, over groups of channels, and over the batch.

Statistics are computed in float32 (float64 for such an input), `scale` and `bias` are applied
where given, and the result is rounded once, to the dtype of the input. Variances are divided by the
count, not by the count less one, and `epsilon` is added to the variance, before the root.

All raise ValueError if `scale` or `bias` does not have the D of the input.
"""

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*B D"]:
    """Brings each vector to mean 0 and variance 1; shifting or scaling the input changes nothing.

    References:
        Ba et al. 2016, "Layer normalization", eq. 4. https://arxiv.org/abs/1607.06450
    """
    x32 = _widen(x)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return _affine(centred * jax.lax.rsqrt(variance + epsilon), scale, bias, x)


def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*B D"]:
    """Brings each vector to mean square 1; scaling the input changes nothing, shifting does.

    A model that keeps its scale as a distance from 1 (Gemma) passes `1 + scale`.

    References:
        Zhang and Sennrich 2019, "RMSNorm", eq. 4. https://arxiv.org/abs/1910.07467
    """
    x32 = _widen(x)
    mean_square = jnp.square(x32).mean(axis=-1, keepdims=True)
    return _affine(x32 * jax.lax.rsqrt(mean_square + epsilon), scale, bias, x)


def group_norm(
    x: Float[Array, "B *space D"],
    num_groups: int,
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "B *space D"]:
    """Brings each group of neighbouring channels, over all places, to mean 0 and variance 1.

    One group is a layer norm over everything but B; D groups are an instance norm.

    Raises:
        ValueError: If `num_groups` does not divide D.

    References:
        Wu and He 2018, "Group normalization", eq. 7. https://arxiv.org/abs/1803.08494
    """
    width = x.shape[-1]
    if num_groups < 1 or width % num_groups:
        raise ValueError(f"group_norm: D={width} is not a multiple of num_groups={num_groups}.")
    groups = _widen(x).reshape(x.shape[0], -1, num_groups, width // num_groups)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    variance = jnp.square(centred).mean(axis=(1, 3), keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    return _affine(y.reshape(x.shape), scale, bias, x)


def batch_norm(
    x: Float[Array, "*B D"],
    running_mean: Float[Array, "D"],
    running_variance: Float[Array, "D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*B D"], tuple[Float[Array, "D"], Float[Array, "D"]]]:
    """Brings each channel to mean 0 and variance 1 over all else; follows the statistics.

    For training; `batch_norm_inference` uses what was followed. Under `jit` the statistics are of
    the whole batch, however it is sharded. No gradient flows through the running statistics.

    Args:
        x: At least two vectors of D channels.
        running_mean: Mean so far, float32; start at 0.
        running_variance: Variance so far, float32; start at 1.
        scale: Factor of each channel.
        bias: Offset of each channel.
        momentum: Share of the old statistics that stays: PyTorch's `momentum` is one less this.
        epsilon: Added to the variance.
        axis_name: Mapped axis (`pmap`, `vmap`) to share statistics over.

    Returns:
        The output in the dtype of `x`, and the new running mean and variance. The running variance
        takes up the unbiased variance, as in the paper and PyTorch (Flax takes the biased one).

    Raises:
        ValueError: If there is but one vector to take the variance of.

    References:
        Ioffe and Szegedy 2015, "Batch normalization", algorithms 1 and 2.
        https://arxiv.org/abs/1502.03167
    """
    axes = tuple(range(x.ndim - 1))
    x32 = _widen(x)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    count = x.size // x.shape[-1] * devices
    if count < 2:
        raise ValueError(f"batch_norm needs at least 2 vectors for a variance, got {count}.")

    def mean(y: Array) -> Array:
        local = y.mean(axis=axes)
        return local if axis_name is None else jax.lax.pmean(local, axis_name)

    expand = (1,) * len(axes) + (-1,)
    centre = mean(x32)
    centred = x32 - centre.reshape(expand)
    variance = mean(jnp.square(centred))
    y = centred * jax.lax.rsqrt(variance + epsilon).reshape(expand)

    seen = jax.lax.stop_gradient((centre, variance * (count / (count - 1))))
    followed = jax.tree.map(
        lambda old, new: momentum * old + (1 - momentum) * new.astype(old.dtype),
        (running_mean, running_variance),
        seen,
    )
    return _affine(y, scale, bias, x), followed


def batch_norm_inference(
    x: Float[Array, "*B D"],
    running_mean: Float[Array, "D"],
    running_variance: Float[Array, "D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "*B D"]:
    """Applies running statistics, so that no example depends on the others; see `batch_norm`."""
    expand = (1,) * (x.ndim - 1) + (-1,)
    x32 = _widen(x)
    factor = jax.lax.rsqrt(running_variance.astype(x32.dtype) + epsilon)
    y = (x32 - running_mean.reshape(expand)) * factor.reshape(expand)
    return _affine(y, scale, bias, x)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _affine(y: Array, scale: Array | None, bias: Array | None, x: Array) -> Array:
    """Applies scale and bias to the last axis, then returns to the dtype of `x`."""
    expand = (1,) * (x.ndim - 1) + (-1,)
    for name, parameter in (("scale", scale), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"norm: {name} has shape {parameter.shape}, the input has D={x.shape[-1]}."
            )
    y = y if scale is None else y * scale.astype(y.dtype).reshape(expand)
    y = y if bias is None else y + bias.astype(y.dtype).reshape(expand)
    return y.astype(x.dtype)
