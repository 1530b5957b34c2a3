"""Ranges of different lengths in one array, and what else NumPy has no quick word for."""

import numpy as np


def ragged(first: np.ndarray, lengths: np.ndarray, step: int = 1) -> np.ndarray:
    """The ranges first[i], first[i] + step, ... of the given lengths, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    within = np.arange(total) - np.repeat(ends - lengths, lengths)
    return np.repeat(first, lengths) + step * within


def grown(values: np.ndarray, used: int, size: int) -> np.ndarray:
    """The array itself, or a larger copy of its first `used` rows with room to spare."""
    if size <= len(values):
        return values
    room = np.zeros((max(size, 2 * len(values)), *values.shape[1:]), values.dtype)
    room[:used] = values[:used]
    return room


def distinct(*parts: np.ndarray) -> np.ndarray:
    """The values of all parts, sorted and once each.

    Quick where the parts are sorted. `np.unique` imports a module at its first call, which would
    hang the child of a fork meanwhile.
    """
    joined = np.sort(np.concatenate(parts), kind="stable")
    return joined[np.append(True, joined[1:] != joined[:-1])] if joined.size else joined
