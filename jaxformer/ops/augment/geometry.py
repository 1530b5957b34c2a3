"""Crops, flips, and small turns, slants, stretches and shifts."""

import jax
import jax.numpy as jnp

from jaxformer.ops.augment.chance import check_light, sometimes
from jaxformer.typing import Array, Float, Key


def random_crop(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    padding: int,
    mode: str = "reflect",
) -> Float[Array, "B height width C"]:
    """Shifts each image by up to `padding` whole pixels, every shift equally likely.

    Args:
        key: Of the shifts.
        images: Images.
        padding: Pixels put around the image before as many are cut off again.
        mode: What the padding is, as `jax.numpy.pad` calls it: `reflect`, `constant` (zeros), ...

    Raises:
        ValueError: If `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"random_crop needs padding >= 0, got padding={padding}.")
    batch, *shape = images.shape
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, sides, mode=mode)
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), shape))(padded, corners)


def random_flip(
    key: Key[Array, ""], images: Float[Array, "B height width C"], probability: float = 0.5
) -> Float[Array, "B height width C"]:
    """Exchanges left and right of each image with a probability."""
    return sometimes(key, probability, images, images[:, :, ::-1])


def random_resized_crop(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    size: tuple[int, int],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "linear",
) -> tuple[Float[Array, "B {size[0]} {size[1]} C"], Float[Array, "B 4"]]:
    """Cuts a random box out of each image and brings it to one size.

    Args:
        key: Of the boxes.
        images: Images.
        size: Height and width of what is returned.
        area: Least and greatest share of the image that a box covers.
        aspect: Least and greatest ratio of a box's width to its height.
        method: As `jax.image.resize` calls it: `linear`, `cubic`, ...

    Returns:
        The resized boxes, see `resized_crop`, and the boxes, see `random_boxes`.

    Raises:
        ValueError: If a range is empty or reaches out of what is possible.

    References:
        Szegedy et al. 2015, "Going deeper with convolutions", section 6 (without bounds that round
        to whole pixels). https://arxiv.org/abs/1409.4842
    """
    count, height, width, _ = images.shape
    boxes = random_boxes(key, count, (height, width), area, aspect)
    return resized_crop(images, boxes, size, method), boxes


def random_boxes(
    key: Key[Array, ""],
    count: int,
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    tries: int = 10,
) -> Float[Array, "{count} 4"]:
    """Draws boxes in an image: area uniform, aspect log-uniform, place uniform.

    Of `tries` shapes the first that fits into the image is taken; if none does, the greatest box
    in the middle of the image whose aspect is in range.

    Args:
        key: Of the boxes.
        count: B.
        size: Height and width of the image.
        area: Least and greatest share of the image that a box covers.
        aspect: Least and greatest ratio of a box's width to its height.
        tries: Shapes drawn for each box.

    Returns:
        Top, left, height and width in pixels, not rounded.

    Raises:
        ValueError: If `area` is not in (0, 1], `aspect` not positive, or a range is empty.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"boxes need 0 < area[0] <= area[1] <= 1, got area={area}.")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"boxes need 0 < aspect[0] <= aspect[1], got aspect={aspect}.")
    height, width = size
    for_shape, for_place = jax.random.split(key)
    draws = jax.random.uniform(for_shape, (2 * tries, count))  # B last: XLA compiles it faster
    pixels = height * width * (area[0] + (area[1] - area[0]) * draws[:tries])
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** draws[tries:]
    tall, wide = jnp.sqrt(pixels / ratio), jnp.sqrt(pixels * ratio)
    fits = (tall <= height) & (wide <= width)
    first = fits.argmax(axis=0)[None, :]

    nearest = min(max(width / height, aspect[0]), aspect[1])
    fitting = fits.any(axis=0)
    tall, wide = (
        jnp.where(fitting, jnp.take_along_axis(drawn, first, axis=0)[0], greatest)
        for drawn, greatest in (
            (tall, min(height, width / nearest)),
            (wide, min(width, height * nearest)),
        )
    )
    down, across = jnp.where(fitting[None, :], jax.random.uniform(for_place, (2, count)), 0.5)
    return jnp.stack([down * (height - tall), across * (width - wide), tall, wide], axis=-1)


def resized_crop(
    images: Float[Array, "B height width C"],
    boxes: Float[Array, "B 4"],
    size: tuple[int, int],
    method: str = "linear",
) -> Float[Array, "B {size[0]} {size[1]} C"]:
    """Brings the content of a box of each image to one size, smoothed where it shrinks.

    Two products with a small matrix for each image. At the edges of a box its surroundings shine
    in, as far as the kernel reaches. Arithmetic is in float32; cubic overshoot is cut to [0, 1].

    Args:
        images: Images.
        boxes: Top, left, height and width in pixels.
        size: Height and width of what is returned.
        method: As `jax.image.resize` calls it: `linear`, `cubic`, ...
    """
    check_light(images)
    shape = (*size, images.shape[-1])
    scales = jnp.array(size, jnp.float32)[None, :] / boxes[:, 2:]

    def resize(image: Array, scale: Array, corner: Array) -> Array:
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -scale * corner, method, antialias=True
        )

    resized = jax.vmap(resize)(images.astype(jnp.float32), scales, boxes[:, :2])
    return jnp.clip(resized, 0, 1).astype(images.dtype)


def affine(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    *,
    turn: float = 0.0,
    shear: float = 0.0,
    stretch: float = 0.0,
    shift: float = 0.0,
) -> Float[Array, "B height width C"]:
    """Turns, slants, stretches and shifts each image about its centre; from outside comes 0.

    Done as two passes of one axis each, every row of pixels moving as a whole: a rotation is a
    slant of the columns and one of the rows, which is good for small angles. Interpolation is
    linear, between the two pixels nearest along the axis.

    Args:
        key: Of the draws, each uniform between what follows and its negative.
        images: Images.
        turn: Angle in radians.
        shear: Columns a row is moved by for each row of distance from the middle.
        stretch: Share by which height and width, each by itself, shrink or grow.
        shift: Pixels to move along each axis.
    """
    check_light(images)
    reach = jnp.array([turn, shear, stretch, stretch, shift, shift])[:, None, None, None]
    draws = reach * jax.random.uniform(key, (6, len(images), 1, 1), minval=-1, maxval=1)
    turned, slant, wide, tall, right, down = draws
    x = _resample(images.astype(jnp.float32), turned + slant, wide, right)
    x = _resample(x.swapaxes(1, 2), -turned, tall, down).swapaxes(1, 2)
    return x.astype(images.dtype)


def _resample(
    images: Float[Array, "B height width C"],
    slant: Float[Array, "B 1 1"],
    stretch: Float[Array, "B 1 1"],
    shift: Float[Array, "B 1 1"],
) -> Float[Array, "B height width C"]:
    """Reads column j of row i from column `(1 + stretch) j + slant i + shift`, from the middle."""
    height, width = images.shape[1:3]
    column = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    row = (jnp.arange(height) - (height - 1) / 2)[None, :, None]
    source = (1 + stretch) * column + slant * row + shift + (width - 1) / 2
    left = jnp.floor(source)
    framed = jnp.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0)))

    def read(columns: Array) -> Array:
        places = jnp.clip(columns.astype(jnp.int32) + 1, 0, width + 1)
        return jax.vmap(jax.vmap(lambda row, at: row[at]))(framed, places)

    share = (source - left)[..., None]
    return (1 - share) * read(left) + share * read(left + 1)
