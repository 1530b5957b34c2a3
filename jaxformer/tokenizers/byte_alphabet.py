"""GPT-2's characters for bytes: how byte-level tokens are written in JSON and in text files."""

import functools
from collections.abc import Sequence

import numpy as np


@functools.cache
def characters() -> np.ndarray:
    """The code point that stands for each byte: uint32 (256,), read-only.

    Printable Latin-1 stands for itself; the other 68 bytes are U+0100 upwards, in order.

    References:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; encoder.py.
    """
    codes = np.arange(256, dtype=np.uint32)
    printable = np.zeros(256, bool)
    for first, last in ((0x21, 0x7E), (0xA1, 0xAC), (0xAE, 0xFF)):
        printable[first : last + 1] = True
    codes[~printable] = 0x100 + np.arange(np.count_nonzero(~printable))
    codes.setflags(write=False)
    return codes


def order() -> list[int]:
    """The bytes in the order of their characters, which is that of their ids after training."""
    return np.argsort(characters()).tolist()


def write(tokens: Sequence[bytes]) -> list[str]:
    """Writes each token's bytes as characters."""
    codes = characters()[np.frombuffer(b"".join(tokens), np.uint8)]
    return _slices(codes.astype("<u4").tobytes().decode("utf-32-le"), tokens)


def read(texts: Sequence[str]) -> list[bytes]:
    """Reads tokens that are written as characters.

    Raises:
        ValueError: If a character stands for no byte.
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    table = np.full(characters().max() + 2, -1, np.int16)
    table[characters()] = np.arange(256)
    values = table[np.minimum(codes, table.size - 1)]
    if (values < 0).any():
        at = int(np.flatnonzero(values < 0)[0])
        ends = np.cumsum([len(text) for text in texts])
        text = texts[int(np.searchsorted(ends, at, side="right"))]
        raise ValueError(
            f"the token {text!r} holds {chr(codes[at])!r}, which stands for no byte: this is no "
            "byte-level vocabulary"
        )
    return _slices(values.astype(np.uint8).tobytes(), texts)


def _slices(joined, parts):
    """Cuts what was joined at the same places again."""
    out, end = [], 0
    for size in map(len, parts):
        out.append(joined[end : end + size])
        end += size
    return out
