"""Character classes of Unicode 16, frozen, so that ids depend on no version of Python."""

import functools
import pathlib
import zlib

import numpy as np

CATEGORIES = (
    *("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No"),
    *("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So"),
    *("Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn"),
)
"""The general categories, in the order of their indices in `categories`."""


@functools.cache
def categories() -> np.ndarray:
    """The general category of every code point: uint8 indices into `CATEGORIES`, read-only.

    References:
        Unicode 16.0, UnicodeData.txt; `scripts/make_unicode_table.py` makes the file from it: the
        lengths of the runs of one category, four bytes each, then a byte for each category. Reading
        it imports nothing, so that a fork meanwhile leaves no lock of an import behind.
    """
    data = zlib.decompress(pathlib.Path(__file__).with_name("unicode16.bin").read_bytes())
    number = len(data) // 5
    lengths, values = np.frombuffer(data, "<u4", number), np.frombuffer(data, np.uint8)[-number:]
    table = np.repeat(values, lengths)
    table.setflags(write=False)
    return table


@functools.cache
def is_space() -> np.ndarray:
    """Whether a code point has the property White_Space, for every code point; read-only."""
    space = np.isin(categories(), [CATEGORIES.index(name) for name in ("Zs", "Zl", "Zp")])
    space[[*range(9, 14), 0x85]] = True
    space.setflags(write=False)
    return space


def members(name: str) -> np.ndarray:
    """The boolean table of a category such as "Lu", or of a whole group such as "L".

    Raises:
        ValueError: If Unicode has no such category.
    """
    indices = [i for i, category in enumerate(CATEGORIES) if category.startswith(name)]
    if not name or not indices:
        raise ValueError(f"Unicode has no general category {name!r}.")
    return np.isin(categories(), indices)


def runs(table: np.ndarray) -> list[tuple[int, int]]:
    """The first and last code point of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], table, [False]])))
    return [(first, after - 1) for first, after in edges.reshape(-1, 2).tolist()]
