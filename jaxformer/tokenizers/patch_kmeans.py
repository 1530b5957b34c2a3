"""A tokenizer of images by the means of their patches: what a learned one is to be held against."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops import codebook, patches
from jaxformer.tokenizers.image import ImageTokenizer, read_folder, write_folder
from jaxformer.typing import Array, Float, Int, Key

_KIND = "patch_kmeans"


@dataclasses.dataclass(frozen=True, eq=False)
class PatchKMeans(ImageTokenizer):
    """Replaces each patch by the nearest of E.

    Attributes:
        codes: E patches, as `ops.patches.patchify` orders their numbers.
        patch: Height and width of a patch in pixels.
        image: Height, width and channels of an image.
    """

    codes: Float[Array, "E channels"]
    patch: tuple[int, int]
    image: tuple[int, int, int]

    @classmethod
    def train(
        cls,
        images: Any,
        patch: tuple[int, int],
        codes: int,
        key: Key[Array, ""],
        *,
        rounds: int = 50,
    ) -> "PatchKMeans":
        """Finds E means of the images' patches, from a start by k-means++.

        The same arguments give the same means. A mean that no patch is nearest to stays.

        Args:
            images: Numbers from 0 to 1, `B height width C`.
            patch: Height and width of a patch in pixels.
            codes: E.
            key: Of the start.
            rounds: Of Lloyd's algorithm.

        Raises:
            ValueError: If the images are no floating-point numbers, a patch does not divide them,
                or there are fewer patches than codes.

        References:
            Lloyd 1982, "Least squares quantization in PCM".
            Arthur and Vassilvitskii 2007, "k-means++", section 2.2.
        """
        images = jnp.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are floats from 0 to 1, got {images.dtype}.")
        images = images.astype(jnp.float32)
        cut = patches.patchify(images, patch)
        cut = cut.reshape(-1, cut.shape[-1])
        if not 1 <= codes <= len(cut):
            raise ValueError(f"E={codes} codes of {len(cut)} patches: expected 1 to that many.")
        means = _lloyd(cut, _spread(cut, codes, key), jnp.asarray(rounds))
        return cls(means, patch, images.shape[1:])

    @property
    def vocab_size(self) -> int:
        return self.codes.shape[0]

    @property
    def size(self) -> tuple[int, int, int]:
        return self.image

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = patches.grid_of(self.size[:2], self.patch)
        return rows, columns

    def _encode(self, images: Array) -> Array:
        return _nearest(images, self.codes, self.patch)

    def _decode(self, ids: Array) -> Array:
        return patches.unpatchify(self.codes[ids], self.patch, self.size[:2])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder with a JSON file and a safetensors file."""
        config = {"kind": _KIND, "patch": self.patch, "image": self.image}
        write_folder(path, config, {"codes": np.asarray(self.codes)})


def load(path: str | os.PathLike[str]) -> PatchKMeans:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or holds another tokenizer.
    """
    config, tensors = read_folder(path, _KIND)
    try:
        patch, image = tuple(config["patch"]), tuple(config["image"])
        tokenizer = PatchKMeans(jnp.asarray(tensors["codes"]), patch, image)
        tokenizer.decode(np.zeros((1, tokenizer.grid[0] * tokenizer.grid[1]), np.int32))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no patches: {error!r}.") from None
    return tokenizer


@functools.partial(jax.jit, static_argnums=2)
def _nearest(images: Array, codes: Array, patch: tuple[int, int]) -> Int[Array, "B P"]:
    return codebook.nearest(patches.patchify(images, patch), codes)


@functools.partial(jax.jit, static_argnums=1)
def _spread(x: Float[Array, "n D"], count: int, key: Array) -> Float[Array, "{count} D"]:
    """Draws vectors one by one, each as likely as its square distance to those drawn before."""

    def draw(least: Array, key: Array) -> tuple[Array, Array]:
        total = jnp.cumsum(least)
        place = jnp.searchsorted(total, jax.random.uniform(key) * total[-1], side="right")
        new = x[jnp.minimum(place, len(x) - 1)]
        return jnp.minimum(least, jnp.square(x - new[None]).sum(axis=-1)), new

    _, drawn = jax.lax.scan(draw, jnp.ones(len(x)), jax.random.split(key, count))
    return drawn


@jax.jit
def _lloyd(x: Float[Array, "n D"], codes: Float[Array, "E D"], rounds: Array) -> Array:
    def move(_: Any, codes: Array) -> Array:
        # Some rows at a time: all distances at once would not fit a cache
        ids = jax.lax.map(lambda row: codebook.nearest(row, codes), x, batch_size=4096)
        counts = codebook.usage(ids, codes.shape[0])[:, None]
        sums = jnp.zeros_like(codes).at[ids].add(x)
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), codes)

    return jax.lax.fori_loop(0, rounds, move, codes)
