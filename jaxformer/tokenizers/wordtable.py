"""Numbers words by their bytes: a hash table in arrays that looks millions of words up at once."""

import itertools
import os

import numpy as np

from jaxformer.tokenizers.ragged import ragged

CHUNKS = 4  # eight bytes each; a longer word is found through a dictionary
INLINE = 8 * CHUNKS

_MASKS = np.array([(1 << (8 * i)) - 1 for i in range(9)], "<u8")
_FOLD = np.uint64(29)
_ROUND = 1 << 16  # words added between two looks at the room left


class WordTable:
    """Numbers distinct words 0, 1, 2 ... in the order in which they are added.

    A word of up to `INLINE` bytes lies in one row of `keys`, padded with zeros; keys and lengths
    are compared in full, so that a hash never decides. It serves one thread at a time.

    Attributes:
        keys: Rows of bytes as little-endian integers; the first `size` are in use.
        lengths: Bytes of each word.
        size: Words known.
        long: The numbers of the words that are longer than `INLINE` bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self.long: dict[bytes, int] = {}
        self.keys = np.zeros((1 << 14, CHUNKS), "<u8")
        self.lengths = np.zeros(1 << 14, np.int32)
        self._slots = np.full(1 << 16, -1, np.int32)
        # Odd and drawn for each table, so that no text can be made whose words all collide.
        self._mix, self._mix_length = np.frombuffer(os.urandom(16), "<u8") | np.uint64(1)

    def number(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The number of each word data[start : start + length]; unknown words are added.

        Args:
            data: The bytes of many words.
            starts: First byte of each word.
            lengths: Bytes of each word, at least 1.

        Returns:
            int64 numbers.
        """
        padded = data + bytes(INLINE + 8)
        at_byte = np.ndarray((len(data) + INLINE,), "<u8", padded, strides=(1,))
        first = at_byte[starts] & _MASKS[np.minimum(lengths, 8)]
        mixed = (first ^ (lengths.astype(np.uint64) * self._mix_length)) * self._mix
        chunks: list[tuple[np.ndarray, np.ndarray]] = []
        rest = np.flatnonzero(lengths > 8)
        for i in range(1, CHUNKS):
            if not rest.size:
                break
            left = lengths[rest] - 8 * i
            key = at_byte[starts[rest] + 8 * i] & _MASKS[np.minimum(left, 8)]
            before = mixed[rest]
            mixed[rest] = (before ^ (before >> _FOLD) ^ key) * self._mix
            chunks.append((rest, key))
            rest = rest[left > 8]

        words = self._slots[self._home(mixed)].astype(np.int64)  # quicker as an index
        found = (self.keys[words, 0] == first) & (self.lengths[words] == lengths) & (words >= 0)
        for i, (which, key) in enumerate(chunks, 1):
            found[which] &= self.keys[words[which], i] == key
        if rest.size:
            words[rest] = self._number_long(data, starts[rest], lengths[rest])
            found[rest] = True
        missing = np.flatnonzero(~found)
        for i in range(0, missing.size, _ROUND):
            some = missing[i : i + _ROUND]
            keys = np.zeros((some.size, CHUNKS), "<u8")
            keys[:, 0] = first[some]
            for j, (which, key) in enumerate(chunks, 1):
                place = np.minimum(np.searchsorted(which, some), which.size - 1)
                has = which[place] == some
                keys[has, j] = key[place[has]]
            words[some] = self._find_or_add(keys, lengths[some], mixed[some])
        return words

    def spelling(self, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all words from a number on, word after word, and the bytes of each."""
        lengths = self.lengths[first : self.size].astype(np.int64)
        inline = np.where(lengths <= INLINE, lengths, 0)
        raw = self.keys[first : self.size].view(np.uint8)
        short = raw[np.arange(INLINE, dtype=np.int32) < inline[:, None]]
        if short.size == lengths.sum():
            return short, lengths
        starts = np.cumsum(lengths) - lengths
        octets = np.empty(int(lengths.sum()), np.uint8)
        octets[ragged(starts, inline)] = short
        recent = itertools.takewhile(lambda item: item[1] >= first, reversed(self.long.items()))
        for word, number in recent:
            start = int(starts[number - first])
            octets[start : start + len(word)] = np.frombuffer(word, np.uint8)
        return octets, lengths

    def _home(self, mixed: np.ndarray) -> np.ndarray:
        return (mixed >> np.uint64(65 - self._slots.size.bit_length())).astype(np.int64)

    def _find_or_add(self, keys: np.ndarray, lengths: np.ndarray, mixed: np.ndarray) -> np.ndarray:
        """Probes for all words at once; of those that meet at an empty slot, one takes it."""
        self._reserve(self.size + lengths.size)
        words = np.empty(lengths.size, np.int32)
        slot, todo = self._home(mixed), np.arange(lengths.size)
        while todo.size:
            here = self._slots[slot[todo]]
            empty = here < 0
            claims = todo[empty]
            if claims.size:
                marks = np.arange(claims.size, dtype=np.int32)
                self._slots[slot[claims]] = marks
                claims = claims[self._slots[slot[claims]] == marks]
                new = np.arange(self.size, self.size + claims.size, dtype=np.int32)
                self._slots[slot[claims]] = new
                self.keys[new], self.lengths[new] = keys[claims], lengths[claims]
                self.size += claims.size
                here = self._slots[slot[todo]]
            same = (self.lengths[here] == lengths[todo]) & (self.keys[here] == keys[todo]).all(1)
            words[todo[same]] = here[same]
            todo = todo[~same]
            slot[todo] = (slot[todo] + 1) & (self._slots.size - 1)
        return words

    def _number_long(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
        numbers, known = [], self.long
        for start, length in zip(starts.tolist(), lengths.tolist()):
            word = data[start : start + length]
            number = known.get(word)
            if number is None:
                self._reserve(self.size + 1)
                number = known[word] = self.size
                self.lengths[number] = length
                self.size += 1
            numbers.append(number)
        return numbers

    def _reserve(self, size: int) -> None:
        """Makes room for words up to a number; slots stay at most a quarter full."""
        room = self.lengths.size
        if size <= room:
            return
        while room < size:
            room *= 2
        keys, lengths = np.zeros((room, CHUNKS), "<u8"), np.zeros(room, np.int32)
        keys[: self.size], lengths[: self.size] = self.keys[: self.size], self.lengths[: self.size]
        self.keys, self.lengths = keys, lengths
        self._slots = np.full(4 * room, -1, np.int32)
        known = np.flatnonzero(lengths[: self.size] <= INLINE).astype(np.int32)
        self._place(known)

    def _place(self, known: np.ndarray) -> None:
        """Puts words, all distinct, into empty slots."""
        lengths = self.lengths[known]
        mixed = (self.keys[known, 0] ^ (lengths.astype(np.uint64) * self._mix_length)) * self._mix
        for i in range(1, CHUNKS):
            which = np.flatnonzero(lengths > 8 * i)
            before = mixed[which]
            mixed[which] = (before ^ (before >> _FOLD) ^ self.keys[known[which], i]) * self._mix
        slot = self._home(mixed)
        while known.size:
            empty = self._slots[slot] < 0
            self._slots[slot[empty]] = known[empty]
            left = self._slots[slot] != known
            known, slot = known[left], (slot[left] + 1) & (self._slots.size - 1)
