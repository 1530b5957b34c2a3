"""Keeps the ids of words, so that all words of many texts are looked up at once."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxformer.tokenizers import wordtable
from jaxformer.tokenizers.ragged import grown

_WORDS, _POOL = 1 << 18, 1 << 22  # bounds: words, and ids of all words


class WordIds:
    """The ids of every word seen; for one thread at a time.

    Attributes:
        encode: Gives the ids of words that are new.
    """

    def __init__(self, encode: Callable[[Sequence[bytes]], list[list[int]]]) -> None:
        self.encode = encode
        self._table = wordtable.WordTable()
        self._pool = np.zeros(1 << 14, np.int32)
        self._used = 0
        self._first = np.zeros(1 << 14, np.int64)  # where a word's ids lie in the pool
        self._count = np.zeros(1 << 14, np.int64)
        self._placed = 0

    @property
    def is_full(self) -> bool:
        """Whether it has grown so large that it should be given up."""
        return self._placed > _WORDS or self._used > _POOL

    def ids(
        self, data: bytes, starts: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words, one after the other, and where each word's end.

        Args:
            data: The bytes of many words.
            starts: First byte of each word.
            sizes: Bytes of each word, at least 1.
        """
        words = self._table.number(data, starts, sizes)
        if self._table.size > self._placed:
            self._add_new()
        count = self._count[words]
        ends = np.cumsum(count)
        index = np.repeat(self._first[words] - (ends - count), count)
        index += np.arange(index.size)
        return self._pool[index], ends

    def _add_new(self) -> None:
        octets, sizes = self._table.spelling(self._placed)
        data, ends = octets.tobytes(), np.cumsum(sizes).tolist()
        new = self.encode([data[start:end] for start, end in zip([0, *ends], ends)])
        count = np.fromiter(map(len, new), np.int64, len(new))
        used, size = self._used + int(count.sum()), self._placed + len(new)
        self._pool = grown(self._pool, self._used, used)
        self._pool[self._used : used] = [token for tokens in new for token in tokens]
        self._first = grown(self._first, self._placed, size)
        self._first[self._placed : size] = self._used + np.cumsum(count) - count
        self._count = grown(self._count, self._placed, size)
        self._count[self._placed : size] = count
        self._used, self._placed = used, size
