"""MNIST: 28x28 grey digits of ten classes, from the package, IDX files or tensorflow-datasets.

References:
    LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition".
    http://yann.lecun.com/exdb/mnist/ (the IDX format is described there too).
    Salakhutdinov and Murray 2008, "On the quantitative analysis of deep belief networks": dynamic
    binarisation, each pixel drawn anew with its grey value as the probability.
"""

import dataclasses
import gzip
import math
import pathlib
import zlib

import numpy as np

from jaxformer.training import tfds
from jaxformer.typing import Int, Shaped, UInt8

_EMBEDDED = pathlib.Path(__file__).with_name("mnist_10k2k.npz")
_CLASSES, _SIDE = 10, 28
_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images with 0 for paper and 255 for ink, labels in [0, 10), and where they came from."""

    train_images: UInt8[np.ndarray, "train 28 28"]
    train_labels: Int[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test 28 28"]
    test_labels: Int[np.ndarray, " test"]
    origin: str


def load(origin: str = "embedded") -> Digits:
    """Reads MNIST and checks it; no network is used, whatever the origin.

    Args:
        origin: One of
            `embedded`: 10,000 + 2,000 images, 1,000 + 200 of each class, that lie in the package;
            `tfds:DIR`: a set prepared by tensorflow-datasets, DIR being its data directory
                or the folder of the version; TensorFlow itself is not needed;
            a folder with the four IDX files, as they are or with `.gz`.

    Returns:
        The images in the order of their files, labels as int32.

    Raises:
        FileNotFoundError: If a folder or a file is missing, naming what was expected.
        ValueError: If a file is cut short or not what its name says, images are not 28x28, a label
            is not in [0, 10), or images and labels differ in number; names the file.
        ModuleNotFoundError: If `tfds:` is asked for and the extra `data` is not installed.
    """
    if origin == "embedded":
        with np.load(_EMBEDDED) as arrays:
            parts = {name: (arrays[name], str(_EMBEDDED)) for name in _IDX_FILES}
    elif origin.startswith("tfds:"):
        parts = _read_tfds(pathlib.Path(origin.removeprefix("tfds:")).expanduser())
    else:
        parts = _read_folder(pathlib.Path(origin).expanduser())
    for split in ("train", "test"):
        _check(parts[f"{split}_images"], parts[f"{split}_labels"])
    arrays = {name: array for name, (array, _) in parts.items()}
    for name in ("train_labels", "test_labels"):
        arrays[name] = arrays[name].astype(np.int32)
    return Digits(**arrays, origin=origin)


def threshold(images: UInt8[np.ndarray, "*B 28 28"]) -> UInt8[np.ndarray, "*B 28 28"]:
    """Turns ink above half grey (127) into 1 and the rest into 0."""
    return (images > 127).astype(np.uint8)


def dynamic(
    images: UInt8[np.ndarray, "*B 28 28"], rng: np.random.Generator
) -> UInt8[np.ndarray, "*B 28 28"]:
    """Draws each pixel anew: 1 with probability `pixel / 255`, exactly."""
    return (rng.integers(255, size=images.shape, dtype=np.uint8) < images).astype(np.uint8)


def check_labels(
    labels: Shaped[np.ndarray, " n"], file: str, images: int, images_file: str, classes: int
) -> None:
    """Refuses labels that are not one for each image, or not in [0, classes).

    Raises:
        ValueError: Naming the file, and the first label that is wrong.
    """
    if len(labels) != images:
        raise ValueError(
            f"{file}: expected {images} labels, one for each image of {images_file}, "
            f"found {len(labels)}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise ValueError(
            f"{file}: expected labels from 0 to {classes - 1}, found "
            f"{labels[wrong[0]]} at row {wrong[0]} ({wrong.size} such labels)."
        )


def _check(images: tuple[np.ndarray, str], labels: tuple[np.ndarray, str]) -> None:
    (pixels, pixels_file), (classes, classes_file) = images, labels
    if pixels.shape[1:] != (_SIDE, _SIDE) or not len(pixels):
        found = "x".join(map(str, pixels.shape))
        raise ValueError(f"{pixels_file}: expected images of {_SIDE}x{_SIDE}, found {found}.")
    check_labels(classes, classes_file, len(pixels), pixels_file, _CLASSES)


def _read_folder(folder: pathlib.Path) -> dict[str, tuple[np.ndarray, str]]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected 'embedded', 'tfds:DIR' or a folder with "
            f"{', '.join(_IDX_FILES.values())} (.gz or not)."
        )
    parts = {}
    for part, name in _IDX_FILES.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        if not (plain.exists() or packed.exists()):
            raise FileNotFoundError(f"{folder}: expected {name} or {name}.gz, found neither.")
        path = plain if plain.exists() else packed
        parts[part] = (_read_idx(path, dimensions=3 if "images" in part else 1), str(path))
    return parts


def _read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, 8, number of dimensions, their sizes, the values."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found: {error}") from error
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of bytes in {dimensions} dimensions, which begins with "
            f"{magic.hex(' ')}, found {content[:4].hex(' ') or 'an empty file'}."
        )
    if len(content) < header:
        raise ValueError(
            f"{path}: expected a header of {header} bytes, found {len(content)} bytes."
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path}: expected {header + math.prod(shape)} bytes, which its header announces, "
            f"found {len(content)}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_tfds(folder: pathlib.Path) -> dict[str, tuple[np.ndarray, str]]:
    train, test, _ = tfds.read(tfds.newest(folder, "mnist"), "MNIST")
    return {
        "train_images": (train.images, train.name),
        "train_labels": (train.labels, train.name),
        "test_images": (test.images, test.name),
        "test_labels": (test.labels, test.name),
    }
