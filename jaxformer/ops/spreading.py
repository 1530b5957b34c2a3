"""Terms of a loss that keep representations apart, so that they do not collapse to one point.

All take vectors along the last axis, over whatever axes before (images, or moments of episodes),
and compare those of the whole batch: under `jit` on whatever devices they lie, under `pmap` each
device's own. Arithmetic and results are float32 (float64 for such inputs).

All raise ValueError if there are fewer than two vectors.
"""

import jax.numpy as jnp
from jax import lax

from jaxformer.typing import Array, Float


def koleo(x: Float[Array, "*B D"], *, epsilon: float = 1e-8) -> Float[Array, ""]:
    """Averages minus the logarithm of each vector's distance to its nearest, all of length 1.

    Spread vectors have a lower value. Gradients reach both of a pair, and are finite for vectors
    that are equal or 0.

    References:
        Sablayrolles et al. 2019, "Spreading vectors for similarity search", eq. 3.
        https://arxiv.org/abs/1806.03198
        Oquab et al. 2024, "DINOv2", section 4, over each device's images; here over all.
        https://arxiv.org/abs/2304.07193
    """
    x = _rows(x)
    x = x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=1, keepdims=True), epsilon**2))
    fixed = lax.stop_gradient(x)
    similarity = jnp.matmul(fixed, fixed.T, precision="highest")
    nearest = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, similarity).argmax(axis=1)
    distance = jnp.sqrt(jnp.square(x - x[nearest] + epsilon).sum(axis=1))
    return -jnp.log(distance + epsilon).mean()


def variance_term(
    x: Float[Array, "*B D"], *, target: float = 1.0, epsilon: float = 1e-4
) -> Float[Array, ""]:
    """Averages over channels by how much the standard deviation falls short of `target`.

    Variances are divided by the count less one, and `epsilon` is added before the root.

    References:
        Bardes et al. 2022, "VICReg", eqs. 1 and 2; weighed by 25 there.
        https://arxiv.org/abs/2105.04906
    """
    deviation = jnp.sqrt(_rows(x).var(axis=0, ddof=1) + epsilon)
    return jnp.maximum(target - deviation, 0).mean()


def covariance_term(x: Float[Array, "*B D"]) -> Float[Array, ""]:
    """Sums the squared covariances of different channels, and divides by D.

    References:
        Bardes et al. 2022, "VICReg", eqs. 3 and 4; weighed by 1 there.
        https://arxiv.org/abs/2105.04906
    """
    x = _rows(x)
    centred = x - x.mean(axis=0, keepdims=True)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / (len(x) - 1)
    width = x.shape[1]
    return jnp.where(jnp.eye(width, dtype=bool), 0, jnp.square(covariance)).sum() / width


def _rows(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < 2:
        raise ValueError(f"vectors are kept apart from others: needs B >= 2, got B={len(rows)}.")
    return rows.astype(jnp.promote_types(x.dtype, jnp.float32))
