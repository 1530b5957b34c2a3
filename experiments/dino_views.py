"""The crops of an image that a student and its teacher see, for `experiments/dino.py`."""

import dataclasses
import os
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops import augment, block_masks
from jaxformer.training import data, pictures
from jaxformer.typing import Array, Float, Key, UInt8

LARGE = 2  # crops of an image that the teacher sees as well


@dataclasses.dataclass(frozen=True)
class Views:
    """How an image is cropped and changed, and what of it is hidden.

    Attributes:
        kind: What else is changed: turned, slanted, stretched and drawn with another pen as
            handwriting may be ("ink"), or mirrored, recoloured and blurred as photographs may be
            ("photo").
        small: Small crops of an image, beside two large ones.
        side: Height and width of a small crop in pixels; patches divide it.
        large_area: Least and greatest share of the image that a large crop covers.
        small_area: Likewise for small ones.
        hidden: Least and greatest share of the patches that is hidden from the student, in half of
            the large crops.
    """

    kind: Literal["ink", "photo"] = "ink"
    small: int = 4
    side: int = 16
    large_area: tuple[float, float] = (0.8, 1.0)
    small_area: tuple[float, float] = (0.55, 1.0)
    hidden: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        if self.small < 0 or self.side < 1:
            raise ValueError(f"there are no small={self.small} crops of side={self.side}.")
        if not 0 <= self.hidden[0] <= self.hidden[1] <= 1:
            raise ValueError(f"hidden={self.hidden} is no range of shares.")


def crops(
    views: Views, key: Key[Array, ""], images: Float[Array, "B height width C"]
) -> tuple[Float[Array, "B 2 height width C"], Float[Array, "B small side side C"]]:
    """Cuts large crops, of the images' own size, and small ones."""

    def cut(key: Array, count: int, size: tuple[int, int], area: tuple[float, float]) -> Array:
        change, crop = jax.random.split(key)
        x = changed(views, change, jnp.repeat(images, count, axis=0))
        x, _ = augment.random_resized_crop(crop, x, size, area=area)
        return x.reshape(len(images), count, *x.shape[1:])

    for_large, for_small = jax.random.split(key)
    size, side = (images.shape[1], images.shape[2]), (views.side, views.side)
    large = cut(for_large, LARGE, size, views.large_area)
    if not views.small:
        return large, jnp.zeros((len(images), 0, *side, images.shape[3]))
    return large, cut(for_small, views.small, side, views.small_area)


def changed(
    views: Views, key: Key[Array, ""], x: Float[Array, "B height width C"]
) -> Float[Array, "B height width C"]:
    """Changes images in what should not matter."""
    if views.kind == "ink":
        bend, pen = jax.random.split(key)
        return redrawn(pen, augment.affine(bend, x, turn=0.2, shear=0.3, stretch=0.2))
    flip, jitter, grey, blur, invert = jax.random.split(key, 5)
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    x = augment.colour_jitter(jitter, augment.random_flip(flip, x), probability=0.8, **strengths)
    x = augment.gaussian_blur(blur, augment.random_grayscale(grey, x), (0.0, x.shape[1] / 100))
    return augment.solarize(invert, x, probability=0.1)


def redrawn(
    key: Key[Array, ""], x: Float[Array, "B height width C"]
) -> Float[Array, "B height width C"]:
    """Draws handwriting with a finer or a broader pen: blurs it, and cuts it at a random level."""
    blur, level = jax.random.split(key)
    x = augment.gaussian_blur(blur, x, (0.8, 0.8), probability=1.0)
    level = jax.random.uniform(level, (len(x), 1, 1, 1), minval=0.05, maxval=0.4)
    return jnp.clip((x - level) / 0.3, 0, 1)


def hide(
    views: Views, grid: tuple[int, int]
) -> Callable[[data.Batch, np.random.Generator], data.Batch]:
    """Makes a transform of batches, which draws the patches to hide from the student.

    It adds `hidden`, a mask for each large crop, and `places`, the indices of what the mask hides,
    filled up with the number of patches.
    """
    most = max(1, int(grid[0] * grid[1] * views.hidden[1]))

    def transform(batch: data.Batch, random: np.random.Generator) -> data.Batch:
        rows = len(batch["images"])
        mask = block_masks.blockwise(random, LARGE * rows, grid, rates=views.hidden)
        mask = mask.reshape(rows, LARGE, -1)
        return batch | {"hidden": mask, "places": block_masks.indices(mask, most)}

    return transform


def draw(
    views: Views,
    pixels: UInt8[np.ndarray, "B height width C"],
    patch: tuple[int, ...],
    path: str | os.PathLike[str],
) -> None:
    """Draws images and their crops, a row an image; the small ones as large as they are."""
    height, width = pixels.shape[1:3]
    down, across = patch
    grid = (height // down, width // across)
    hidden = hide(views, grid)({"images": pixels}, np.random.default_rng(0))["hidden"]
    images = pixels / np.float32(255)
    cut = jax.jit(crops, static_argnums=0)
    large, small = jax.device_get(cut(views, jax.random.key(0), images))
    framed = np.full((*small.shape[:2], *pixels.shape[1:]), 0.8, np.float32)
    framed[:, :, : views.side, : views.side] = small[:, :, :height, :width]
    columns = [images[:, None], large, pictures.hide(large, hidden, (down, across)), framed]
    names = ["image", *["teacher"] * LARGE, *["student"] * (LARGE + views.small)]
    title = "Images, and the crops that the teacher and the student see"
    pictures.image_grid(np.concatenate(columns, axis=1), path, (), names, title)
