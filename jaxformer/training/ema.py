"""How slowly a moving average of the parameters follows them."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxformer.typing import Array, PyTree


def ramped(limit: float) -> optax.Schedule:
    """Keeps `(1 + step) / (10 + step)` of the old average until that reaches `limit`.

    The random parameters that an average starts at are so soon forgotten.

    Raises:
        ValueError: If `limit` lies outside [0, 1).
    """
    if not 0 <= limit < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got ema_decay={limit}.")
    return lambda step: jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """Goes from `start` to `end` along half a cosine wave, and stays there after `steps`.

    Teachers keep from 0.996 (DINO, I-JEPA) or 0.992 (DINOv2) of themselves to 1; weight decay goes
    from 0.04 to 0.4 along the same curve.

    Raises:
        ValueError: If `steps` is not positive.

    References:
        Grill et al. 2020, "Bootstrap your own latent", section 3.2.
        https://arxiv.org/abs/2006.07733
    """
    if steps < 1:
        raise ValueError(f"a schedule needs steps >= 1, got steps={steps}.")

    def value(step: ArrayLike) -> Array:
        done = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * done)) / 2

    return value


def follow(average: PyTree, params: PyTree, decay: ArrayLike) -> PyTree:
    """Keeps the share `decay` of each leaf of an average and takes the rest from the parameters."""
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), average, params)
