"""Which images of a batch are changed."""

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float, Key


def check_light(*arrays: Array) -> None:
    """Refuses what is not of floating-point numbers, which would be cut or wrap around.

    Raises:
        ValueError: If an array has another dtype.
    """
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"augmentations need floats in [0, 1], got {x.dtype}.")


def sometimes(
    key: Key[Array, ""],
    probability: float,
    images: Float[Array, "B height width C"],
    changed: Float[Array, "B height width C"],
) -> Float[Array, "B height width C"]:
    """Takes each image from `changed` with a probability, else from `images`, whose dtype stays.

    Raises:
        ValueError: If `probability` is not in [0, 1], or the images are no floats.
    """
    check_light(images)
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability lies in [0, 1], got probability={probability}.")
    if probability == 1:
        return changed.astype(images.dtype)
    chosen = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(chosen, changed.astype(images.dtype), images)
