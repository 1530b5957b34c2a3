"""Labelled images prepared by tensorflow-datasets, read without TensorFlow.

References:
    https://www.tensorflow.org/datasets: sets of random access, in array_record files.
"""

import dataclasses
import importlib
import io
import pathlib
import re
from typing import Any

import numpy as np

from jaxformer.typing import Shaped


@dataclasses.dataclass(frozen=True)
class Split:
    """Images in the order of their records, their labels, and what to call them in an error."""

    images: Shaped[np.ndarray, "n height width *C"]
    labels: Shaped[np.ndarray, " n"]
    name: str


def newest(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Finds the newest version of a set.

    Args:
        folder: The data directory of tensorflow-datasets, the folder of the set, or of a version.
        name: Of the set, as its folder in the data directory.

    Raises:
        FileNotFoundError: If there is none.
    """
    for below in ("", "*/", f"{name}/*/"):
        found = [path.parent for path in folder.glob(f"{below}dataset_info.json")]
        if found:
            return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    raise FileNotFoundError(
        f"{folder}: expected a set prepared by tensorflow-datasets, such as "
        f"{name}/3.0.1/dataset_info.json, found none."
    )


def read(version: pathlib.Path, what: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads the splits `train` and `test` of a version of a set, and the names of its labels.

    Args:
        version: The folder with `dataset_info.json`; its records have `image` and `label`.
        what: What is expected there, for an error.

    Raises:
        ModuleNotFoundError: If the extra `data` is not installed.
        ValueError: If a split is missing, damaged, or not of labelled images of one size.
    """
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        importlib.import_module("importlib_resources")  # it needs both, and declares neither
        image = importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tfds:{version} needs the package {error.name}: pip install 'jaxformer[data]'"
        ) from error

    def split(part: str) -> tuple[Split, tuple[str, ...]]:
        name = f"{version} (split {part!r})"
        try:
            source = tfds.builder_from_directory(version).as_data_source(
                part, decoders={"image": tfds.decode.SkipDecoding()}
            )
            records = _records(source)
            images = [np.asarray(image.open(io.BytesIO(record["image"]))) for record in records]
            labels = np.array([record["label"] for record in records])
            names = tuple(source.dataset_info.features["label"].names)
            return Split(np.stack(images), labels, name), names
        except Exception as error:
            raise ValueError(
                f"{name}: expected {what} in array_record files, found: {error}"
            ) from error

    (train, names), (test, _) = split("train"), split("test")
    return train, test, names


def _records(source: Any) -> list[dict[str, Any]]:
    """Reads a thousand records at a time, several times faster than one by one."""
    thousands = range(0, len(source), 1000)
    return [
        record
        for start in thousands
        for record in source.__getitems__(range(start, min(start + 1000, len(source))))
    ]
