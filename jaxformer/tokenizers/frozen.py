"""Reads and writes the tables that are shipped with the code.

A file is compressed; its first line gives the dtype and the size of each array, their bytes follow.
Reading imports nothing, unlike `np.load`: a fork while a thread imports would hang the child.
"""

import pathlib
import zlib
from collections.abc import Sequence

import numpy as np


def path(name: str) -> pathlib.Path:
    """Where a table lies."""
    return pathlib.Path(__file__).with_name(f"{name}.bin")


def read(name: str) -> list[np.ndarray]:
    """The arrays of a table, one-dimensional and read-only."""
    head, _, data = zlib.decompress(path(name).read_bytes()).partition(b"\n")
    arrays, start = [], 0
    for entry in head.decode("ascii").split():
        kind, size = entry.split(":")
        arrays.append(np.frombuffer(data, kind, int(size), start))
        start += arrays[-1].nbytes
    return arrays


def write(name: str, arrays: Sequence[np.ndarray]) -> None:
    """Writes one-dimensional arrays."""
    head = " ".join(f"{array.dtype.newbyteorder('<').str}:{array.size}" for array in arrays)
    data = b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    path(name).write_bytes(zlib.compress(head.encode("ascii") + b"\n" + data, 9))
