"""Losses of a model that fills in what it was not shown, as pixels or as representations.

All are losses by position; `losses.masked_mean` averages them over the hidden patches:

    target = reconstruction.normalised_patches(patches.patchify(images, patch))
    loss = losses.masked_mean(reconstruction.squared_error(predicted, target), hidden)

Arithmetic and results are float32 (float64 for such inputs).
"""

import jax.numpy as jnp

from jaxformer.typing import Array, Float


def normalised_patches(
    patches: Float[Array, "*B D"], *, epsilon: float = 1e-6
) -> Float[Array, "*B D"]:
    """Brings the pixels of each patch to mean 0 and variance 1.

    Variances are divided by the count less one, and `epsilon` is added before the root: a patch of
    one colour becomes 0.

    Raises:
        ValueError: If a patch is of a single number.

    References:
        He et al. 2022, "Masked autoencoders are scalable vision learners", section 3.
        https://arxiv.org/abs/2111.06377 (which divisor, its code tells).
    """
    if patches.shape[-1] < 2:
        raise ValueError(f"a patch of D={patches.shape[-1]} has no variance.")
    patches = _widen(patches)
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return (patches - mean) / jnp.sqrt(variance + epsilon)


def squared_error(
    predicted: Float[Array, "*B D"], target: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """Averages the squared differences over the last axis."""
    return jnp.square(_widen(predicted) - _widen(target)).mean(axis=-1)


def smooth_l1(
    predicted: Float[Array, "*B D"], target: Float[Array, "*B D"], *, beta: float = 1.0
) -> Float[Array, "*B"]:
    """Averages over the last axis differences that are squared if small, and absolute if large.

    A difference `d` below `beta` counts `d² / (2 beta)`, another `d - beta / 2`; with `beta=0` all
    are absolute. Of a JEPA, `target` is the teacher's output after `norms.layer_norm`.

    References:
        Girshick 2015, "Fast R-CNN", eq. 3. https://arxiv.org/abs/1504.08083
        Assran et al. 2023, "I-JEPA", section 3; squared there, smooth in its code.
        https://arxiv.org/abs/2301.08243
    """
    if beta < 0:
        raise ValueError(f"smooth_l1 needs beta >= 0, got {beta}.")
    distance = jnp.abs(_widen(predicted) - _widen(target))
    if not beta:
        return distance.mean(axis=-1)
    small = jnp.minimum(distance, beta)
    return (small * (distance - small / 2) / beta).mean(axis=-1)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
