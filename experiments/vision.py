"""What the experiments with images share: pixels as models read them, and many of them in turn."""

import dataclasses
import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.analysis import representation
from jaxformer.models.encoder import attention_maps
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import linear
from jaxformer.training import images, pictures
from jaxformer.typing import Array, Float, PyTree, Shaped, UInt8

Features = Float[np.ndarray, "images D"]
_NEIGHBOURS = 8


def light(pixels: UInt8[Array, "*B height width C"]) -> Float[Array, "*B height width C"]:
    """Turns bytes into numbers from 0 (black) to 1 (white)."""
    return pixels.astype(jnp.float32) / 255


def centred(x: Float[Array, "*B height width C"]) -> Float[Array, "*B height width C"]:
    """Turns light from 0 to 1 into what models read: numbers from -1 to 1."""
    return 2 * x - 1


def reader(
    apply: Callable[[PyTree, Array], PyTree], batch: int = 500
) -> Callable[[PyTree, UInt8[np.ndarray, "images height width C"]], PyTree]:
    """Makes a function of many images, which are read a batch at a time, of one that is jitted.

    Args:
        apply: Takes parameters and a batch of images, centred, to arrays of a row an image.
        batch: Images at a time.
    """
    once = jax.jit(lambda params, pixels: apply(params, centred(light(pixels))))

    def read(params: PyTree, pixels: Shaped[np.ndarray, "images height width C"]) -> Any:
        found = []
        for at in range(0, len(pixels), batch):
            part = pixels[at : at + batch]
            whole = np.pad(part, ((0, min(batch, len(pixels)) - len(part)), *[(0, 0)] * 3))
            found.append(once(params, jnp.asarray(whole)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pixels)], *found)

    return read


def settled(config: ViTConfig, seen: images.Images) -> ViTConfig:
    """Gives a config the size and the channels of images.

    Raises:
        ValueError: If its patches do not divide them.
    """
    height, width, channels = seen.train_images.shape[1:]
    return dataclasses.replace(config, size=(height, width), channels=channels)


def create(model: nn.Module, config: ViTConfig, seed: int, *, places: int = 2) -> PyTree:
    """Draws the parameters of a model of images and of numbers of patches, so many arrays of these.

    Two are those of patches to see and of patches to predict.
    """
    start, patch = jnp.zeros((1, *config.size, config.channels)), jnp.zeros((1, 1), jnp.int32)
    return jax.jit(model.init)(jax.random.key(seed), start, *[patch] * places)


def meaning(cfg: Any, seen: images.Images) -> dict[str, Any]:
    """The settings of a run, and a number for images and labels, that a checkpoint depends on.

    Args:
        cfg: A dataclass; where a run lies and how often it speaks change nothing.
        seen: The images, wherever they lie.
    """
    how = ("run", "data", "mesh", "save_every", "log_every")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in how}
    number = zlib.crc32(seen.train_images.tobytes())
    number = zlib.crc32(seen.train_labels.tobytes(), number)
    return settings | {"images": zlib.crc32(repr(seen.label_names).encode(), number)}


def pooled(
    config: ViTConfig,
) -> Callable[[PyTree, UInt8[np.ndarray, "images height width C"]], Any]:
    """Makes a `reader` of a vector of each image, by parameters whose `encoder` is a `ViT`."""
    model = ViT(config, project=linear.project_input_first)

    def apply(params: PyTree, x: Array) -> Any:
        return model.apply({"params": params["params"]["encoder"]}, x, method="pooled")

    return reader(apply)


def features(
    config: ViTConfig, sides: tuple[PyTree, PyTree], seen: images.Images
) -> dict[str, tuple[Features, Features]]:
    """Reads training and test images by parameters after training ("") and before ("untrained, ").

    Args:
        config: Of the encoder.
        sides: Parameters after training, and before.
        seen: The images.
    """
    read = pooled(config)
    return {
        name: (read(params, seen.train_images), read(params, seen.test_images))
        for name, params in zip(("", "untrained, "), sides)
    }


def judge(
    seen: images.Images, bank: Float[np.ndarray, "train D"], queries: Float[np.ndarray, "test D"]
) -> dict[str, float]:
    """Measures in % how well classes are read from features of images, if these have several.

    Args:
        seen: The images.
        bank: Features of the training images, to fit a linear probe to and to find neighbours in.
        queries: Features of the test images.
    """
    if len(seen.label_names) < 2:
        return {}
    sides = (bank, seen.train_labels, queries, seen.test_labels)
    near = min(20, len(bank))
    return {
        "linear probe %": 100 * representation.linear_probe(*sides),
        f"{near} neighbours %": 100 * representation.knn_accuracy(*sides, k=near),
    }


def judge_pixels(seen: images.Images) -> dict[str, float]:
    """Measures the same of the bare pixels, which a representation should beat."""
    bank, queries = (
        x.reshape(len(x), -1) / np.float32(255) for x in (seen.train_images, seen.test_images)
    )
    return {f"pixels, {name}": value for name, value in judge(seen, bank, queries).items()}


def draw_attention(
    model: nn.Module,
    params: PyTree,
    pixels: UInt8[np.ndarray, "images height width C"],
    path: str | os.PathLike[str],
) -> None:
    """Draws where the class token of a `ViT` looks in each image, a row for each of its layers."""
    config: ViTConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
    maps = attention_maps(model, params, centred(light(jnp.asarray(pixels))))
    looks = np.asarray(maps[:, :, :, 0, config.prefix :].mean(axis=2)).swapaxes(0, 1)
    patch = (config.patch[0], config.patch[1])
    layers = [pictures.heat(pixels, look, patch) for look in looks]
    plain = np.broadcast_to(pixels / 255, layers[0].shape)
    names = ["image", *(f"layer {n + 1}" for n in range(len(layers)))]
    title = "What the class token reads, mean of the heads"
    pictures.image_grid(np.stack([plain, *layers]), path, names, (), title)


def draw_neighbours(
    seen: images.Images,
    bank: Float[np.ndarray, "train D"],
    queries: Float[np.ndarray, "test D"],
    path: str | os.PathLike[str],
) -> None:
    """Draws test images, one of each of ten classes, and the training images nearest to each."""
    _, chosen = np.unique(seen.test_labels, return_index=True)
    chosen = chosen[:10] if seen.label_names else np.arange(min(10, len(queries)))
    count = min(_NEIGHBOURS, len(bank))
    _, places = representation.nearest(bank, queries[chosen], count)
    grid = np.concatenate([seen.test_images[chosen][:, None], seen.train_images[places]], axis=1)
    columns = ("image", *(str(n + 1) for n in range(count)))
    pictures.image_grid(grid, path, (), columns, "Test images and the nearest of the others")
