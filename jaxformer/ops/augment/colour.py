"""Changes of colour and sharpness."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.ops.augment.chance import check_light, sometimes
from jaxformer.typing import Array, Float, Key

Images = Float[Array, "B height width C"]
Factors = Float[Array, "B"]


def colour_jitter(
    key: Key[Array, ""],
    images: Images,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Images:
    """Changes brightness, contrast, saturation and hue, in an order drawn anew for each batch.

    Factors are drawn for each image, uniformly from `[max(0, 1 - strength), 1 + strength]`,
    the turn of its hue from `[-hue, hue]`. What has strength 0 is left out. The rest is done in
    float32, and rounded once.

    Args:
        key: Of the order, the factors and the choice of images.
        images: Grey (C=1) or RGB (C=3).
        brightness: Strength of `scale_brightness`.
        contrast: Strength of `scale_contrast`.
        saturation: Strength of `scale_saturation`.
        hue: Strength of `turn_hue`, in whole turns of the colour circle.
        probability: With which an image is changed at all.

    Raises:
        ValueError: If a strength is negative, `hue` exceeds 1/2, or C is neither 1 nor 3.

    References:
        Chen et al. 2020, "A simple framework for contrastive learning of visual representations",
        appendix A. https://arxiv.org/abs/2002.05709
    """
    if not 0 <= hue <= 0.5 or min(brightness, contrast, saturation) < 0:
        raise ValueError(
            f"colour_jitter needs strengths >= 0 and hue <= 1/2, got brightness={brightness}, "
            f"contrast={contrast}, saturation={saturation}, hue={hue}."
        )
    _grey(images)
    for_order, for_factors, for_choice = jax.random.split(key, 3)
    draws = jax.random.uniform(for_factors, (4, len(images)))
    changes: list[Callable[[Array], Array]] = []
    for change, strength, draw in zip(
        (scale_brightness, scale_contrast, scale_saturation),
        (brightness, contrast, saturation),
        draws,
    ):
        if strength > 0:
            low, high = max(0.0, 1 - strength), 1 + strength
            changes.append(functools.partial(change, factors=low + (high - low) * draw))
    if hue > 0:
        changes.append(functools.partial(turn_hue, turns=hue * (2 * draws[3] - 1)))
    if not changes:
        return images
    order = jax.random.permutation(for_order, len(changes))
    start = images.astype(jnp.float32)
    changed, _ = jax.lax.scan(lambda x, i: (jax.lax.switch(i, changes, x), None), start, order)
    return sometimes(for_choice, probability, images, changed)


def scale_brightness(images: Images, factors: Factors) -> Images:
    """Multiplies each image by its factor, and cuts it to [0, 1]."""
    return _blend(images, 0.0, factors)


def scale_contrast(images: Images, factors: Factors) -> Images:
    """Multiplies each image's distance from its mean grey by its factor; cuts it to [0, 1]."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdims=True), factors)


def scale_saturation(images: Images, factors: Factors) -> Images:
    """Multiplies each pixel's distance from its grey by its image's factor; cuts it to [0, 1]."""
    return _blend(images, _grey(images), factors)


def turn_hue(images: Images, turns: Factors) -> Images:
    """Turns the hue of each image on the colour circle; lightness and saturation (HSV) stay.

    Grey images have no hue and stay as they are.

    Args:
        images: Grey (C=1) or RGB (C=3).
        turns: 1 is a whole turn, which changes nothing.

    Raises:
        ValueError: If C is neither 1 nor 3.
    """
    check_light(images)
    if images.shape[-1] == 1:
        return images
    _grey(images)
    x = images.astype(jnp.float32)
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    high, low = x.max(-1), x.min(-1)
    reach = high - low
    safe = jnp.where(reach > 0, reach, 1)
    sixths = jnp.where(
        high == red,
        (green - blue) / safe,
        jnp.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixths + 6 * turns.astype(jnp.float32)[:, None, None]
    away = (turned[..., None] + jnp.array([5.0, 3.0, 1.0])[None, None, None, :]) % 6
    share = jnp.clip(jnp.minimum(away, 4 - away), 0, 1)
    return (high[..., None] - reach[..., None] * share).astype(images.dtype)


def random_grayscale(key: Key[Array, ""], images: Images, probability: float = 0.2) -> Images:
    """Takes the colour from each image with a probability; C stays."""
    return sometimes(key, probability, images, jnp.broadcast_to(_grey(images), images.shape))


def solarize(
    key: Key[Array, ""], images: Images, threshold: float = 0.5, probability: float = 0.2
) -> Images:
    """Inverts what is at least as light as `threshold`, in each image with a probability."""
    return sometimes(key, probability, images, jnp.where(images >= threshold, 1 - images, images))


def gaussian_blur(
    key: Key[Array, ""],
    images: Images,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> Images:
    """Blurs each image with a probability, by a Gaussian of its own width.

    The Gaussian is not cut off; at the border its weights within the image are brought to sum 1
    (others reflect the image there). Two products with a small matrix for each image, in float32.

    Args:
        key: Of widths and the choice of images.
        images: Images.
        sigma: Least and greatest standard deviation in pixels, of a uniform draw; 0 is no blur.
        probability: With which an image is blurred at all.

    Raises:
        ValueError: If `sigma` is negative or its range empty.
    """
    if not 0 <= sigma[0] <= sigma[1]:
        raise ValueError(f"gaussian_blur needs 0 <= sigma[0] <= sigma[1], got sigma={sigma}.")
    for_width, for_choice = jax.random.split(key)
    widths = jax.random.uniform(for_width, (len(images),), minval=sigma[0], maxval=sigma[1])
    down, across = (_smoothing(widths, side) for side in images.shape[1:3])
    x = jnp.einsum("bik,bkjc->bijc", down, images.astype(jnp.float32), precision="highest")
    x = jnp.einsum("bjk,bikc->bijc", across, x, precision="highest")
    return sometimes(for_choice, probability, images, jnp.clip(x, 0, 1))


def _smoothing(widths: Factors, side: int) -> Float[Array, "B {side} {side}"]:
    places = jnp.arange(side, dtype=jnp.float32)
    distance = (places[:, None] - places[None, :])[None] / jnp.maximum(widths, 1e-3)[:, None, None]
    return jax.nn.softmax(-jnp.square(distance) / 2, axis=-1)


def _grey(images: Images) -> Float[Array, "B height width 1"]:
    channels = images.shape[-1]
    if channels == 1:
        return images
    if channels != 3:
        raise ValueError(f"colours need grey (C=1) or RGB images (C=3), got C={channels}.")
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(images: Images, other: Array | float, factors: Factors) -> Images:
    check_light(images)
    factors = factors.astype(images.dtype)[:, None, None, None]
    return jnp.clip(factors * images + (1 - factors) * other, 0, 1)
