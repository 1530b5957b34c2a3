"""Cuts many texts into words at once, with the array form of a pattern."""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxformer.tokenizers import pretokens

SAFE = re.compile("(?<=[0-9A-Za-zà-öа-яא-תぁ-んァ-ヺ一-鿿가-힣])[ \n]")
"""White space after letters or digits starts a word in every known pattern: a text may be cut."""


def cut(
    texts: Sequence[str], starts: pretokens.Starts
) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts texts into words.

    Bytes that are no UTF-8 stand in the texts as the surrogates of `surrogateescape`.

    Returns:
        The bytes of all texts, the first byte and the number of bytes of each word, and the number
        of words up to the end of each text.
    """
    filled = [text for text in texts if text]
    if not filled:
        none = np.zeros(0, np.int64)
        return b"", none, none, np.zeros(len(texts), np.int64)
    joined = filled[0] if len(filled) == 1 else "\n".join(filled)
    sizes = np.fromiter(map(len, filled), np.int64, len(filled))
    gaps = np.cumsum(sizes[:-1]) + np.arange(sizes.size - 1)
    if joined.isascii():
        octets = bytearray(joined, "ascii")
        np.frombuffer(octets, np.uint8)[gaps] = pretokens.BREAK_BYTE
        data = bytes(octets)
        bounds = np.flatnonzero(starts(data))
    else:
        codes = np.frombuffer(bytearray(joined.encode("utf-32-le", "surrogatepass")), "<u4")
        codes[gaps] = pretokens.BREAK_CODE
        data = joined.encode("utf-8", "surrogateescape")
        position = _byte_positions(data, codes)
        bounds, gaps = position[np.flatnonzero(starts(codes))], position[gaps]
    first = bounds[:-1]
    lengths = bounds[1:] - first
    if gaps.size:
        breaks = np.searchsorted(first, gaps)
        is_word = np.ones(first.size, bool)
        is_word[breaks] = False
        first, lengths = first[is_word], lengths[is_word]
        ends = np.append(breaks - np.arange(breaks.size), first.size)
    else:
        ends = np.array([first.size])
    if len(filled) < len(texts):
        ends = np.append(0, ends)[np.cumsum([bool(text) for text in texts])]
    return data, first, lengths, ends


def _byte_positions(data: bytes, codes: np.ndarray) -> np.ndarray:
    """The first byte of each character, and the end."""
    octets = np.frombuffer(data, np.int8)
    lead = np.flatnonzero(octets >= -64)  # every byte but those that continue a character
    if lead.size != codes.size:  # some bytes are no UTF-8
        width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        width[(codes >= 0xDC80) & (codes <= pretokens.BREAK_CODE)] = 1
        return np.append(0, np.cumsum(width))
    return np.append(lead, octets.size)


def blocks(
    texts: Iterable[str], size: int, safe: re.Pattern[str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Groups texts into blocks of bounded size, cutting long ones at safe places.

    Args:
        texts: Any texts, empty ones too.
        size: Characters of a block; more where no safe place is near.
        safe: Matches where a text may be cut, before the match.

    Yields:
        The parts of a block, and the indices of those that end a text.
    """
    block: list[str] = []
    whole: list[int] = []
    filled = 0
    for text in texts:
        start = 0
        while len(text) - start > size and (match := safe.search(text, start + size)):
            yield [*block, text[start : match.start()]], np.array(whole, np.int64)
            block, whole, filled, start = [], [], 0, match.start()
        block.append(text[start:])
        whole.append(len(block) - 1)
        filled += len(text) - start
        if filled >= size:
            yield block, np.array(whole, np.int64)
            block, whole, filled = [], [], 0
    if block:
        yield block, np.array(whole, np.int64)
