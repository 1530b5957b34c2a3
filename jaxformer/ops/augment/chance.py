"""Which images of a batch are changed."""

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float, Key


def sometimes(
    key: Key[Array, ""],
    probability: float,
    images: Float[Array, "B height width C"],
    changed: Float[Array, "B height width C"],
) -> Float[Array, "B height width C"]:
    """Takes each image from `changed` with a probability, else from `images`, whose dtype stays.

    Raises:
        ValueError: If `probability` is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability lies in [0, 1], got probability={probability}.")
    if probability == 1:
        return changed.astype(images.dtype)
    chosen = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(chosen, changed.astype(images.dtype), images)
