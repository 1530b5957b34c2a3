"""Keeps the ids of words, so that all words of many texts are looked up at once."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxformer.tokenizers import wordtable
from jaxformer.tokenizers.ragged import grown

_WORDS, _POOL = 1 << 19, 1 << 23  # bounds of a table: words, and ids of all words

Words = tuple[bytes, np.ndarray, np.ndarray]
"""The bytes of many words, the first byte of each and its number of bytes, at least 1."""

Encode = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From the bytes of words, one after the other, and the bytes of each, to ids and their numbers."""


class WordIds:
    """Looks up the ids of words, and has those encoded that are new; any thread may ask.

    A table of what is known is taken from the idle ones and given back: threads never share one, a
    fork finds none half changed, and an interrupt loses the one in use. A table that has grown
    beyond a bound is given up.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._idle: list[_Table] = []

    def look_up(self, parts: Sequence[Words]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of words, one after the other, and where each word's end, for each part.

        What is new in all parts is encoded at once; that parts are small keeps arrays in the cache.
        """
        try:
            table = self._idle.pop()
        except IndexError:
            table = _Table(self._encode)
        result = table.ids(parts)
        if table.size <= _WORDS and table.used <= _POOL:
            self._idle.append(table)
        return result


class _Table:
    """The ids of every word seen; for one thread at a time."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._words = wordtable.WordTable()
        self._pool = np.zeros(1 << 14, np.int32)
        self.used = 0
        self._place = np.zeros(1 << 14, np.int64)  # a word's first id in the pool << 32 | how many
        self.size = 0

    def ids(self, parts: Sequence[Words]) -> list[tuple[np.ndarray, np.ndarray]]:
        numbers = [self._words.number(*part) for part in parts]
        if self._words.size > self.size:
            self._store(*self._encode(*self._words.spelling(self.size)))
        return [self._gathered(words) for words in numbers]

    def _gathered(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = self._place[words]
        count = place & 0xFFFFFFFF
        ends = np.cumsum(count)
        index = np.repeat((place >> 32) - (ends - count), count)
        index += np.arange(index.size)
        return self._pool[index], ends

    def _store(self, ids: np.ndarray, counts: np.ndarray) -> None:
        used, size = self.used + ids.size, self.size + counts.size
        self._pool = grown(self._pool, self.used, used)
        self._pool[self.used : used] = ids
        self._place = grown(self._place, self.size, size)
        offsets = self.used + np.cumsum(counts) - counts
        self._place[self.size : size] = (offsets << 32) | counts
        self.used, self.size = used, size
