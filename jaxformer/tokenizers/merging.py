"""Merges byte pairs in order of priority: plainly, and in thousands of words at once.

All forms give the same ids: again and again the adjacent pair of the best rank, the leftmost of
equals, is replaced by its result, until no adjacent pair merges.
"""

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from jaxformer.tokenizers.ragged import distinct, ragged

NONE = np.int32(2**31 - 1)
"""The rank of a pair that does not merge."""

_NO_MERGE = int(NONE) << 32

_BITS = np.uint64(21)
_LIMIT = 1 << 21
_MIX = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.uint64(2**64 - 1)


def merge(
    ids: Sequence[int], ranks: Mapping[tuple[int, int], int], results: Sequence[int]
) -> list[int]:
    """Merges the pairs of one word: the reference, in O(n log n).

    Args:
        ids: The symbols of the word.
        ranks: Priority of each pair that merges, the smallest first.
        results: The symbol that a merge of each rank gives.
    """
    ids, size = list(ids), len(ids)
    after, before = [*range(1, size), -1], list(range(-1, size - 1))
    heap = [
        (rank, i) for i in range(size - 1) if (rank := ranks.get((ids[i], ids[i + 1]))) is not None
    ]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j < 0 or ids[i] < 0 or ranks.get((ids[i], ids[j])) != rank:
            continue
        ids[i], ids[j] = results[rank], -1
        after[i], after[j] = after[j], -1
        if after[i] >= 0:
            before[after[i]] = i
            _push(heap, ranks, ids, i, after[i])
        if before[i] >= 0:
            _push(heap, ranks, ids, before[i], i)
    return [symbol for symbol in ids if symbol >= 0]


def _push(
    heap: list[tuple[int, int]],
    ranks: Mapping[tuple[int, int], int],
    ids: Sequence[int],
    i: int,
    j: int,
) -> None:
    rank = ranks.get((ids[i], ids[j]))
    if rank is not None:
        heapq.heappush(heap, (rank, i))


class Merges:
    """The ranks of pairs, looked up for whole arrays, and what each rank gives.

    Attributes:
        results: The symbol that a merge of each rank gives.
        nested: Whether every merge comes after those that make its parts, as trained ones do.
    """

    def __init__(self, merges: np.ndarray, results: np.ndarray) -> None:
        """Builds the table.

        Args:
            merges: Left and right symbol of each rank, (M, 2).
            results: The symbol that each gives, (M,).

        Raises:
            ValueError: If there are more than 2**21 merges or symbols.
        """
        if len(merges) >= _LIMIT or (
            merges.size and int(max(merges.max(), results.max())) >= _LIMIT
        ):
            raise ValueError(f"At most {_LIMIT} merges and symbols are possible.")
        self.results = results.astype(np.int32)
        self.nested = _nested(merges, results)
        bits = max(10, int(8 * len(merges)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.full(1 << bits, _EMPTY)
        pairs = merges.astype(np.uint64)
        key = (pairs[:, 0] << _BITS) | pairs[:, 1]
        entry = (key << _BITS) | np.arange(len(merges), dtype=np.uint64)
        slot = ((key * _MIX) >> self._shift).astype(np.int64)
        while entry.size:
            empty = self._table[slot] == _EMPTY
            self._table[slot[empty]] = entry[empty]
            left = self._table[slot] != entry
            entry, slot = entry[left], (slot[left] + 1) & (self._table.size - 1)

    def ranks(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The rank of each pair of symbols, `NONE` where it does not merge; int32."""
        key = (left.astype(np.uint64) << _BITS) | right.astype(np.uint64)
        slot = ((key * _MIX) >> self._shift).astype(np.int64)
        entry = self._table[slot]
        hit = (entry >> _BITS) == key
        ranks = np.where(hit, (entry & np.uint64(_LIMIT - 1)).astype(np.int32), NONE)
        todo = np.flatnonzero(~hit & (entry != _EMPTY))
        while todo.size:
            slot[todo] = (slot[todo] + 1) & (self._table.size - 1)
            entry = self._table[slot[todo]]
            hit = (entry >> _BITS) == key[todo]
            ranks[todo[hit]] = (entry[hit] & np.uint64(_LIMIT - 1)).astype(np.int32)
            todo = todo[~hit & (entry != _EMPTY)]
        return ranks

    def merge_words(
        self, symbols: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Merges many words side by side, in each round the best pair of each word.

        The rounds are those of the longest word, the work that of all symbols left in each.

        Args:
            symbols: All words' symbols, one word after the other.
            lengths: Symbols of each word, (W,), at least 1.

        Returns:
            The symbols that are left, word after word, and their number for each word.
        """
        words, left = np.arange(lengths.size), lengths.astype(np.int64)
        first = np.cumsum(left) - left
        place, number = first, left.copy()  # where a finished word goes, and its symbols
        done = np.zeros(symbols.size, np.int32)
        state = self._ranked(symbols, first + left - 1)
        while words.size:
            best = np.minimum.reduceat(state, first)
            over = best >= _NO_MERGE
            if over.any():
                ended, length = words[over], left[over]
                gone = np.repeat(over, left)
                done[ragged(place[ended], length)] = state[gone].astype(np.int32)
                number[ended] = length
                state, keep = state[~gone], ~over
                words, left, best = words[keep], left[keep], best[keep]
                first = np.cumsum(left) - left
                if not words.size:
                    break
            at = np.flatnonzero(state == np.repeat(best, left))
            if self.nested:  # the pairs born come later: so all occurrences of the best at once
                at = _every_second(at, at[1:] - at[:-1] == 1)
                hits = np.diff(np.searchsorted(at, first), append=at.size)
            else:
                at, hits = at[np.searchsorted(at, first)], np.ones(words.size, np.int64)
            state = self._merge_at(state, at)
            left = left - hits
            first = np.cumsum(left) - left
            word = np.repeat(np.arange(words.size), hits)
            at = at - np.arange(at.size)
            self._rank_again(state, at, at > first[word], at < (first + left - 1)[word])
        return done[ragged(place, number)], number

    def _ranked(self, symbols: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Symbols, each with the rank of the pair that it begins in the upper half."""
        ranks = np.append(self.ranks(symbols[:-1], symbols[1:]), NONE)
        ranks[last] = NONE
        return (ranks.astype(np.int64) << 32) | symbols

    def _merge_at(self, state: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Puts results in the place of pairs."""
        state[at] = self.results[state[at] >> 32]
        keep = np.ones(state.size, bool)
        keep[at + 1] = False
        return state[keep]

    def _rank_again(
        self, state: np.ndarray, at: np.ndarray, has_left: np.ndarray, has_right: np.ndarray
    ) -> None:
        """Looks up the pairs to which new symbols belong."""
        state[at[~has_right]] |= _NO_MERGE
        at = np.concatenate([at[has_left] - 1, at[has_right]])
        symbols = state[at] & 0xFFFFFFFF
        ranks = self.ranks(symbols, state[at + 1] & 0xFFFFFFFF)
        state[at] = (ranks.astype(np.int64) << 32) | symbols

    def merge_long(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `merge_words`, but all occurrences of a pair at once: nearly linear in the symbols."""
        if not self.nested:
            return self._merge_singly(symbols, lengths)
        size = symbols.size
        symbols = np.append(symbols, np.int32(0))
        last = np.cumsum(lengths) - 1
        after, before = np.arange(1, size + 2), np.arange(-1, size)
        after[last], before[last[:-1] + 1] = size, -1  # position `size` stands for no neighbour
        rank_at = np.append(self.ranks(symbols[:-1], symbols[1:]), NONE)
        rank_at[last] = NONE
        alive = np.ones(size, bool)
        waiting: dict[int, list[np.ndarray]] = {}
        heap: list[int] = []
        _wait(waiting, heap, np.flatnonzero(rank_at != NONE), rank_at)
        while heap:
            rank = heapq.heappop(heap)
            parts = waiting.pop(rank)
            at = parts[0] if len(parts) == 1 else distinct(*parts)
            at = at[rank_at[at] == rank]
            if not at.size:
                continue
            at = _every_second(at, after[at[:-1]] == at[1:])
            gone = after[at]
            follows = after[gone]
            symbols[at] = self.results[rank]
            alive[gone] = False
            rank_at[gone] = NONE
            after[at] = follows
            before[follows] = at
            changed = distinct(at, before[at][before[at] >= 0])
            follows = after[changed]
            fresh = self.ranks(symbols[changed], symbols[follows])
            fresh[follows == size] = NONE
            rank_at[changed] = fresh
            _wait(waiting, heap, changed[fresh != NONE], rank_at)
        return symbols[:size][alive], np.add.reduceat(alive, last - lengths + 1, dtype=np.int64)

    def _merge_singly(
        self, symbols: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        ranks, results = self._mapping(), self.results.tolist()
        words = np.split(symbols, np.cumsum(lengths)[:-1])
        merged = [merge(word.tolist(), ranks, results) for word in words]
        flat = np.array([symbol for word in merged for symbol in word], np.int32)
        return flat, np.array([len(word) for word in merged])

    def _mapping(self) -> dict[tuple[int, int], int]:
        """The ranks as a dictionary."""
        entry = self._table[self._table != _EMPTY]
        mask = np.uint64(_LIMIT - 1)
        left, right = entry >> np.uint64(42), (entry >> _BITS) & mask
        return dict(zip(zip(left.tolist(), right.tolist()), (entry & mask).tolist()))


def _nested(merges: np.ndarray, results: np.ndarray) -> bool:
    """Whether each result is new, and is a part of later merges only."""
    if not len(results):
        return True
    made = np.full(int(max(merges.max(), results.max())) + 1, -1)
    made[results] = np.arange(len(results))
    once = distinct(results).size == results.size
    return once and bool((made[merges] < np.arange(len(results))[:, None]).all())


def _every_second(at: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Of overlapping occurrences, as in a run of one symbol, every second from the left."""
    if not overlaps.any():
        return at
    first = np.append(True, ~overlaps)
    start = np.flatnonzero(first)[np.cumsum(first) - 1]
    return at[(np.arange(at.size) - start) % 2 == 0]


def _wait(
    waiting: dict[int, list[np.ndarray]], heap: list[int], at: np.ndarray, rank_at: np.ndarray
) -> None:
    """Files positions under their ranks."""
    if not at.size:
        return
    ranks = rank_at[at]
    order = np.argsort(ranks, kind="stable")
    at, ranks = at[order], ranks[order]
    edges = np.flatnonzero(np.append(True, ranks[1:] != ranks[:-1]))
    for part, rank in zip(np.split(at, edges[1:]), ranks[edges].tolist()):
        if rank not in waiting:
            waiting[rank] = []
            heapq.heappush(heap, rank)
        waiting[rank].append(part)
