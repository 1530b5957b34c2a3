"""Labelled images for training: embedded digits, prepared sets, folders of pictures, npz files.

References:
    Lake, Salakhutdinov, Tenenbaum 2015, "Human-level concept learning through probabilistic program
    induction" (Omniglot). Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST".
    https://arxiv.org/abs/1708.07747. Krizhevsky 2009, "Learning multiple layers of features from
    tiny images" (CIFAR-10).
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxformer.training import image_files, mnist, tfds
from jaxformer.typing import Int, UInt8

_PREPARED = ("mnist", "fashion_mnist", "cifar10")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of C=1 (grey) or C=3 (RGB) bytes, their labels, and where they came from.

    Attributes:
        train_images: To learn from.
        train_labels: int32, each in [0, len(label_names)); all 0 where there are no names.
        test_images: Never to be learnt from.
        test_labels: As `train_labels`.
        label_names: One for each class; none if the images have no classes.
        origin: What `load` was given.
    """

    train_images: UInt8[np.ndarray, "train height width C"]
    train_labels: Int[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test height width C"]
    test_labels: Int[np.ndarray, " test"]
    label_names: tuple[str, ...]
    origin: str


def load(
    origin: str = "embedded",
    *,
    size: int | tuple[int, int] | None = None,
    held_out: float = 0.1,
) -> Images:
    """Reads images and checks them; no network is used, whatever the origin.

    Args:
        origin: One of
            `embedded`: the MNIST of the package, 10,000 + 2,000 grey images of 28x28;
            `tfds:DIR`: `mnist`, `fashion_mnist` or `cifar10` as tensorflow-datasets prepared it,
                DIR being its data directory, the folder of the set or of the version; any other set
                of images of one size by the latter two; TensorFlow itself is not needed;
            `folder:DIR`, or the folder alone: PNG and JPEG files, in a sub-folder for each class,
                whose sorted names are the classes, or without classes in DIR itself; files of other
                kinds are left out;
            `npz:FILE`: arrays `x` (rows of images, with C or without; the most is 1, 16 or 255, the
                least of these that no value exceeds) and, if there are, `y` (labels), `label_names`
                and `names` (of the rows); or `packed` (bits, 8 a byte), `shape`, `character` and
                `character_names`, as Omniglot.
        size: Height and width to bring each image to, or both at once: it is cut to their ratio
            about its centre and resized. Without it images stay as they are, all of one size.
        held_out: Share of a folder or a file to test with, since they have no such share of their
            own. A hash of an image's name (folder and file, `names`, or the number of the row)
            decides, so that it stays on its side when others come or go.

    Returns:
        Images in the order of their files. A folder's are turned as their EXIF data tells and laid
        on white where they are transparent; they are RGB unless all of them are grey.

    Raises:
        FileNotFoundError: If a folder or a file is missing, naming what was expected.
        ValueError: If a file is damaged or not what its name says, images differ in size, labels
            do not fit, or either side of `held_out` would be empty; names the file.
        ModuleNotFoundError: If `tfds:` is asked for and the extra `data` is not installed.
    """
    kind, _, place = origin.partition(":")
    path = pathlib.Path(place if kind in ("tfds", "npz", "folder") else origin).expanduser()
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and min(sides) < 1:
        raise ValueError(f"Images need a height and a width of at least 1, got size={size}.")
    if origin == "embedded":
        train, test, names = _embedded()
    elif kind == "tfds":
        train, test, names = _read_tfds(path)
    elif kind == "npz":
        whole, keys, names = _read_npz(path)
        train, test = _divide(whole, keys, held_out)
    else:
        images, labels, keys, names = image_files.read(path, sides)
        train, test = _divide(tfds.Split(images, labels, str(path)), keys, held_out)
    fitted = (
        split.images
        if sides in (None, split.images.shape[1:3])
        else image_files.fit(split.images, sides)
        for split in (train, test)
    )
    train_images, test_images = fitted
    return Images(train_images, train.labels, test_images, test.labels, names, origin)


def _embedded() -> tuple[tfds.Split, tfds.Split, tuple[str, ...]]:
    digits = mnist.load()
    train = tfds.Split(digits.train_images[..., None], digits.train_labels, digits.origin)
    test = tfds.Split(digits.test_images[..., None], digits.test_labels, digits.origin)
    return train, test, tuple("0123456789")


def _read_tfds(folder: pathlib.Path) -> tuple[tfds.Split, tfds.Split, tuple[str, ...]]:
    sets = [name for name in _PREPARED if (folder / name).is_dir()]
    if len(sets) > 1:
        raise ValueError(
            f"{folder}: expected one set, found {', '.join(sets)}; name it: tfds:{folder / sets[0]}"
        )
    version = tfds.newest(folder, (sets or _PREPARED)[0])
    train, test, names = tfds.read(version, "labelled images")
    train, test = (_checked(s.images, s.labels, s.name, len(names)) for s in (train, test))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{test.name}: expected images of {train.images.shape[1:]}, as those to train with, "
            f"found {test.images.shape[1:]}."
        )
    return train, test, names


def _read_npz(path: pathlib.Path) -> tuple[tfds.Split, list[str], tuple[str, ...]]:
    """Reads images, what their side depends on, and the names of their classes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an npz file with x.")
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = dict(stored)
    except Exception as error:
        raise ValueError(f"{path}: expected a whole npz file, found: {error}") from error
    needed = ("packed", "shape", "character", "character_names")
    needed = needed if "packed" in arrays else ("x",)
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(f"{path}: expected {', '.join(needed)}, found no {', '.join(missing)}.")
    if "packed" in arrays:
        arrays |= {"x": _unpacked(arrays["packed"], arrays["shape"].tolist(), path)}
        arrays |= {"y": arrays["character"], "label_names": arrays["character_names"]}
    if "y" not in arrays:
        arrays |= {"y": np.zeros(len(arrays["x"]), np.int64), "label_names": np.array([], str)}
    x, y = arrays["x"], arrays["y"]
    if y.dtype.kind not in "iu" or y.ndim != 1 or not y.size:
        raise ValueError(f"{path}: expected integers y, one a row, found {y.dtype} of {y.shape}.")
    names = arrays["label_names"] if "label_names" in arrays else np.arange(y.max() + 1)
    keys = arrays["names"] if "names" in arrays else np.arange(len(y))
    whole = _checked(_bytes(x, path), y, str(path), max(1, len(names)))
    if len(keys) != len(y):
        raise ValueError(f"{path}: expected {len(y)} names, one a row, found {len(keys)}.")
    return whole, [str(key) for key in keys], tuple(str(name) for name in names)


def _unpacked(packed: np.ndarray, size: list[int], path: pathlib.Path) -> np.ndarray:
    count = math.prod(size)
    if packed.dtype != np.uint8 or packed.shape[1:] != (-(-count // 8),):
        raise ValueError(
            f"{path}: expected images of {'x'.join(map(str, size))} bits packed in rows of "
            f"{-(-count // 8)} bytes, found {packed.dtype} of {packed.shape}."
        )
    return np.unpackbits(packed, axis=-1, count=count).reshape(-1, *size)


def _bytes(x: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Stretches values up to 1, 16 or 255 to bytes."""
    numbers = x.dtype.kind in "biuf" and x.size > 0
    most = next((most for most in (1, 16, 255) if numbers and x.max() <= most), None)
    if most is None or x.min() < 0:
        raise ValueError(
            f"{path}: expected x from 0 to 1, 16 or 255, found {x.dtype} of {x.shape}"
            f"{f' from {x.min()} to {x.max()}' if numbers else ''}."
        )
    return x if most == 255 and x.dtype == np.uint8 else np.round(x * (255 / most)).astype(np.uint8)


def _checked(images: np.ndarray, labels: np.ndarray, name: str, classes: int) -> tfds.Split:
    """Gives images an axis C and labels their dtype, and refuses what has no meaning."""
    rows = images if images.ndim == 4 else images[..., None]
    if rows.ndim != 4 or rows.shape[-1] not in (1, 3) or rows.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected rows of grey or RGB images of bytes, found {images.dtype} of "
            f"{images.shape}."
        )
    mnist.check_labels(labels, name, len(rows), name, classes)
    return tfds.Split(rows, labels.astype(np.int32), name)


def _divide(
    whole: tfds.Split, keys: Sequence[str], held_out: float
) -> tuple[tfds.Split, tfds.Split]:
    """Sets aside the rows whose key has a hash in the lowest share of all hashes."""
    if not 0 <= held_out < 1:
        raise ValueError(f"A share lies in [0, 1), got held_out={held_out}.")
    hashes = [hashlib.sha256(key.encode()).digest()[:8] for key in keys]
    chosen = np.array([int.from_bytes(hash, "big") < held_out * 2**64 for hash in hashes])
    if chosen.all() or (held_out > 0 and not chosen.any()):
        raise ValueError(
            f"{whole.name}: held_out={held_out} leaves {np.sum(~chosen)} images to train with and "
            f"{np.sum(chosen)} to test with; expected some of both."
        )
    left = tfds.Split(whole.images[~chosen], whole.labels[~chosen], whole.name)
    return left, tfds.Split(whole.images[chosen], whole.labels[chosen], whole.name)
