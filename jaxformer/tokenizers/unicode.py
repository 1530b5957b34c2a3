"""Character classes of Unicode 16, frozen, so that ids depend on no version of Python."""

import functools

import numpy as np

from jaxformer.tokenizers import frozen

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
        Unicode 16.0, UnicodeData.txt; `scripts/make_unicode_table.py` makes the table from it.
    """
    lengths, values = frozen.read("unicode16")
    table = np.repeat(values, lengths)
    table.setflags(write=False)
    return table


@functools.cache
def is_space() -> np.ndarray:
    """Whether a code point has the property White_Space, for every code point; read-only."""
    space = members("Z")
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
    inside = np.zeros(len(CATEGORIES), bool)
    inside[indices] = True
    return inside[categories()]


def runs(table: np.ndarray) -> list[tuple[int, int]]:
    """The first and last code point of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], table, [False]])))
    return [(first, after - 1) for first, after in edges.reshape(-1, 2).tolist()]
