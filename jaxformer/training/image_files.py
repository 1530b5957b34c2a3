"""PNG and JPEG files: folders of them become one array of bytes."""

import pathlib
from concurrent import futures
from typing import TYPE_CHECKING

import numpy as np

from jaxformer.typing import Int, UInt8

if TYPE_CHECKING:
    from PIL import Image

_ENDINGS = (".png", ".jpg", ".jpeg")


def read(
    folder: pathlib.Path, size: tuple[int, int] | None
) -> tuple[
    UInt8[np.ndarray, "n height width C"], Int[np.ndarray, " n"], list[str], tuple[str, ...]
]:
    """Reads a folder of images, or one of sub-folders that are classes.

    Hidden files, and files whose names do not end as a PNG or JPEG file's, are left out.

    Args:
        folder: Where the files are, or the sub-folders with the files.
        size: Height and width to cut and resize each image to.

    Returns:
        The images sorted by class and name, grey (C=1) if all are, else RGB; their labels, 0
        without classes; their paths below the folder, with `/`; the names of the classes.

    Raises:
        FileNotFoundError: If the folder is missing, or it or a class holds no such file.
        ValueError: If files lie beside classes, a file is damaged or not an image, or images differ
            in size and `size` is None; names the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one of PNG and JPEG files.")
    classes = [path for path in _visible(folder) if path.is_dir()]
    stray = _pictures(folder)
    if classes and stray:
        raise ValueError(
            f"{stray[0]}: expected every image in a class, as there are the folders "
            f"{classes[0].name} to {classes[-1].name}; found it beside them."
        )
    files, labels = [], []
    for label, place in enumerate(classes or [folder]):
        found = _pictures(place)
        if not found:
            raise FileNotFoundError(f"{place}: expected PNG or JPEG files, found none.")
        files += found
        labels += [label] * len(found)
    with futures.ThreadPoolExecutor() as threads:
        images = list(threads.map(lambda file: decode(file, size), files))
    height, width, _ = images[0].shape
    for file, image in zip(files, images):
        if image.shape[:2] != (height, width):
            raise ValueError(
                f"{file}: expected an image of {height}x{width}, as {files[0].name} is, found "
                f"{image.shape[0]}x{image.shape[1]}; `size` brings all to one."
            )
    shape = height, width, max(image.shape[-1] for image in images)
    stack = np.stack([np.broadcast_to(image, shape) for image in images])
    paths = [file.relative_to(folder).as_posix() for file in files]
    return stack, np.array(labels, np.int32), paths, tuple(path.name for path in classes)


def decode(
    file: pathlib.Path, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "height width C"]:
    """Reads a PNG or JPEG file as grey (C=1) or RGB, upright, on white where it is transparent.

    What Pillow does not read stays opaque: a transparent colour of 16-bit RGB, or of grey in 2 or 4
    bits.

    Raises:
        ValueError: If the file is not such an image, or cut short; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            return _bytes(_flatten(ImageOps.exif_transpose(image)), size)
    except Exception as error:  # Pillow's decoders raise what they like
        raise ValueError(f"{file}: expected a PNG or JPEG image, found: {error}") from error


def fit(
    images: UInt8[np.ndarray, "n height width C"], size: tuple[int, int]
) -> UInt8[np.ndarray, "n new_height new_width C"]:
    """Cuts images about their centre to the ratio of `size`, height and width, and resizes them."""
    from PIL import Image

    fitted = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for image, new in zip(images, fitted):
        new[:] = _bytes(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), size)
    return fitted


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in _ENDINGS and path.is_file()]


def _bytes(image: "Image.Image", size: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image, ImageOps

    if size is not None:
        height, width = size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _flatten(image: "Image.Image") -> "Image.Image":
    """Makes any image grey or RGB of 8 bits."""
    from PIL import Image

    grey = image.mode[0] in "1LI"
    if image.mode[0] == "I":  # 16 bits, which Pillow would cut at 255 instead of scaling
        deep = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            deep[deep == image.info["transparency"]] = 65535
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "P":
        image = image.convert("RGB")
        grey = bool((np.ptp(np.asarray(image), axis=-1) == 0).all())
    return image.convert("L" if grey else "RGB")
