"""The contract of image tokenizers, and the folders they are saved in."""

import abc
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from jaxformer.tokenizers.tokenizer import write_atomically
from jaxformer.typing import Array, Float, Int

_CONFIG = "tokenizer.json"
_ROWS = 256  # images at once


class ImageTokenizer(abc.ABC):
    """An immutable value that turns images into a grid of ids and ids into images, with loss.

    Images are numbers from 0 to 1, `B height width C`; what is decoded lies there too. They may be
    arrays of NumPy or JAX; results are NumPy's.
    """

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of ids."""

    @abc.abstractmethod
    def _encode(self, images: Float[Array, "B height width C"]) -> Int[Array, "B P"]:
        """Encodes one batch; compiled by whoever implements it."""

    @abc.abstractmethod
    def _decode(self, ids: Int[Array, "B P"]) -> Float[Array, "B height width C"]:
        """Decodes one batch; compiled by whoever implements it."""

    @property
    def bits_per_image(self) -> float:
        """The rate: what an image's ids take if all of them are as likely."""
        return math.prod(self.grid) * math.log2(self.vocab_size)

    def encode(self, images: Any) -> Int[np.ndarray, "B P"]:
        """Turns images into ids, row by row.

        Raises:
            ValueError: If the images are no floating-point numbers of this tokenizer's size.
        """
        images = np.asarray(images)
        if images.shape[1:] != self.size or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(
                f"images are floats of {self.size}; got {images.dtype}, {images.shape}."
            )
        return _in_batches(self._encode, images.astype(np.float32))

    def decode(self, ids: Any) -> Float[np.ndarray, "B height width C"]:
        """Turns ids into images.

        Raises:
            ValueError: If there are more or fewer ids than an image has, or one is not in the
                vocabulary.
        """
        ids, count = np.asarray(ids), math.prod(self.grid)
        if ids.ndim != 2 or ids.shape[1] != count or ids.dtype.kind not in "iu":
            raise ValueError(f"ids are integers of B × {count}, got {ids.dtype} {ids.shape}.")
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"ids run from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}."
            )
        return np.clip(_in_batches(self._decode, ids.astype(np.int32)), 0, 1)

    def distortion(self, images: Any) -> float:
        """Mean square error of a pixel after encoding and decoding, of at least one image."""
        error = self.decode(self.encode(images)).astype(np.float64) - np.asarray(images)
        return float(np.square(error).mean())


def _in_batches(compute: Callable[[Array], Array], rows: np.ndarray) -> np.ndarray:
    """Computes some rows at a time, always as many, so that one program serves any number."""
    parts = []
    for start in range(0, max(1, len(rows)), _ROWS):
        part = rows[start : start + _ROWS]
        padded = np.pad(part, [(0, _ROWS - len(part))] + [(0, 0)] * (rows.ndim - 1))
        parts.append(jax.device_get(compute(jnp.asarray(padded)))[: len(part)])
    return np.concatenate(parts)


def write_folder(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes a configuration and arrays; the folder holds the old or the new whenever it is read.

    The arrays lie in a file that is named by what it holds, which the configuration names: it is
    written last, and the file that it named before is then removed.

    Raises:
        ValueError: If the folder has a `tokenizer.json` of another kind, such as that of a text
            tokenizer.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    before = _named_before(folder / _CONFIG)
    data = safetensors.save({name: np.asarray(x, order="C") for name, x in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:16]}.safetensors"
    write_atomically(folder / name, data)
    text = json.dumps({**config, "tensors": name, "sha256": digest}, indent=2) + "\n"
    write_atomically(folder / _CONFIG, text.encode())
    if before not in (None, name):
        (folder / before).unlink(missing_ok=True)


def _named_before(config: pathlib.Path) -> str | None:
    """The file of arrays that a configuration names; None if there is no configuration."""
    if not config.exists():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        _, name, _ = found["kind"], found["tensors"], found["sha256"]
        return pathlib.Path(name).name
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{config} is not that of an image tokenizer: save elsewhere.") from None


def read_folder(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `write_folder` wrote.

    Args:
        path: The folder.
        kind: What the configuration must say it is.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is not what was written, or the folder holds another kind.
    """
    file = pathlib.Path(path, _CONFIG)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {path} holds no image tokenizer.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        found, name, digest = config["kind"], config.pop("tensors"), config.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} describes no image tokenizer: {error!r}.") from None
    if found != kind:
        raise ValueError(f"{path} holds a tokenizer of kind {found!r}, not {kind!r}.")
    tensors = pathlib.Path(path, pathlib.Path(str(name)).name)
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors} does not exist, but {file} names it.")
    data = tensors.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{tensors} is not what was written: its checksum differs.")
    try:
        return config, safetensors.load(data)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{tensors} is no safetensors file of NumPy's types: {error}.") from None
