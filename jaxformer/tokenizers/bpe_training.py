"""Trains byte pair encoding: the merges of one at a time, found many at a time.

Distinct words are counted first. Their symbols then lie in one array as a linked list, every
occurrence of a pair in one slice of a pool, and a batch of the most frequent pairs is merged at
once: as many as surely come next, in their order, whatever the others give birth to.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from jaxformer.tokenizers import cutting
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.ragged import grown, ragged
from jaxformer.tokenizers.tokenizer import Texts, documents
from jaxformer.tokenizers.wordtable import WordTable

Progress = Callable[[int, int], None]

_BLOCK = 1 << 19  # characters counted at once
_NEVER = re.compile("(?!)")  # where a text may be cut if nothing is known of the pattern
_FRONT = 2000  # candidates kept in order


def count_words(texts: Texts, pattern: Pattern) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts distinct words.

    Returns:
        Their bytes, one word after the other, the bytes of each, and how often each occurs.
    """
    table, counts = WordTable(), np.zeros(0, np.int64)
    starts = pattern.starts
    for block, _ in cutting.blocks(documents(texts), _BLOCK, cutting.SAFE if starts else _NEVER):
        words = table.number(*(cutting.cut(block, starts)[:3] if starts else _cut(block, pattern)))
        more = np.bincount(words, minlength=table.size)
        more[: counts.size] += counts
        counts = more
    return (*table.spelling(), counts)


def _cut(texts: list[str], pattern: Pattern) -> tuple[bytes, np.ndarray, np.ndarray]:
    words = [word.encode() for text in texts for word in pattern.split(text)]
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    return b"".join(words), np.cumsum(lengths) - lengths, lengths


def merge_words(
    symbols: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    tokens: list[bytes | None],
    wanted: int,
    min_frequency: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Finds merges, and appends the tokens they make.

    Args:
        symbols: Symbols of all distinct words, one word after the other; indices into `tokens`.
        lengths: Symbols of each word.
        counts: How often each word occurs.
        tokens: What each symbol stands for; the new tokens are appended.
        wanted: Number of merges.
        min_frequency: The count that a pair needs.
        progress: Called with the number of merges made and wanted.

    Returns:
        Left and right symbol of each merge, (M, 2).
    """
    state = _State.of(symbols, lengths, counts, (len(tokens) + wanted).bit_length())
    front = _Front(max(min_frequency, 1))
    merges: list[tuple[int, int]] = []
    width, batches = 32, 0
    while len(merges) < wanted:
        slots = front.best(state, min(width, wanted - len(merges)))
        offered = slots.size
        slots = slots[: _independent(state.pairs[slots])]
        if not slots.size:
            break
        done = state.merge(slots, len(tokens), front)
        pairs = state.pairs[slots[:done]]
        made = list(zip((pairs >> 32).tolist(), (pairs & 0xFFFFFFFF).tolist()))
        merges.extend(made)
        tokens.extend(tokens[left] + tokens[right] for left, right in made)
        # Wider while whole batches go through, narrower when they are cut.
        width = (
            min(256, max(16, 2 * done)) if done == offered else max(16, min(width, 2 * done + 8))
        )
        batches += 1
        if progress is not None and batches % 16 == 0:
            progress(len(merges), wanted)
    if progress is not None:
        progress(len(merges), len(merges))
    return np.array(merges, np.int32).reshape(-1, 2)


def _independent(pairs: np.ndarray) -> int:
    """How many of the pairs, from the first, share no symbol as one's end and another's start."""
    starts: set[int] = set()
    ends: set[int] = set()
    lefts, rights = (pairs >> 32).tolist(), (pairs & 0xFFFFFFFF).tolist()
    for i, (left, right) in enumerate(zip(lefts, rights)):
        if left == right:
            return max(i, 1)
        if left in ends or right in starts:
            return i
        starts.add(left)
        ends.add(right)
    return len(lefts)


class _Front:
    """The candidates that may come next, so that not every pair is looked at for every batch.

    It holds every pair whose order is below `bound`; counts only fall, so that others stay out.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._slots = np.zeros(0, np.int64)
        self.bound = np.int64(0)

    def best(self, state: "_State", number: int) -> np.ndarray:
        """The slots of the best pairs, best first."""
        order = state.order(self._slots)
        inside = order < self.bound
        if int(np.count_nonzero(inside)) < min(number, 64):
            order = self._refill(state)
        else:
            self._slots, order = self._slots[inside], order[inside]
            if self._slots.size > 2 * _FRONT:
                self._cut(order, _FRONT // 2)
                order = state.order(self._slots)
        number = min(number, self._slots.size)
        clipped = self._slots[state.counts[self._slots] >= state.most]
        if clipped.size:  # counts too large for the order: few, and before all others
            exact = np.lexsort((state.pairs[clipped], -state.counts[clipped]))
            return clipped[exact][:number]
        if self._slots.size > 4 * number:
            some = np.argpartition(order, number - 1)[:number]
            return self._slots[some[np.argsort(order[some])]]
        return self._slots[np.argsort(order)[:number]]

    def add(self, slots: np.ndarray, order: np.ndarray) -> None:
        new = slots[order < self.bound]
        if new.size:
            self._slots = np.concatenate([self._slots, new])

    def _refill(self, state: "_State") -> np.ndarray:
        counts = state.counts[: state.size]
        slots = np.flatnonzero(counts >= self._least)
        if slots.size > _FRONT:  # a histogram of counts tells which can be among the best
            counts = counts[slots]
            limit = min(int(counts.max()), 1 << 16)
            above = np.bincount(np.minimum(counts, limit), minlength=limit + 1)[::-1].cumsum()
            slots = slots[counts >= max(limit - int(np.searchsorted(above, _FRONT)), 1)]
        self._slots = slots
        order = state.order(slots)
        self.bound = order.max() + 1 if slots.size else np.int64(0)
        if slots.size > 2 * _FRONT:
            self._cut(order, _FRONT)
            order = state.order(self._slots)
        return order

    def _cut(self, order: np.ndarray, number: int) -> None:
        some = np.argpartition(order, number)[:number]
        self._slots, self.bound = self._slots[some], order[some].max() + 1


@dataclasses.dataclass
class _State:
    """All words as one linked list of symbols, and where each pair occurs.

    A pair is numbered by a slot. It is born once, when one of its symbols is, and all of its
    occurrences with it; later ones only vanish, so that its occurrences stay one slice of `pool`,
    of which those count whose position still has this slot.
    """

    symbols: np.ndarray  # at each position; stale where merged into the position before
    after: np.ndarray  # next position of the word, -1 at its end
    before: np.ndarray
    weight: np.ndarray  # how often the word occurs
    slot_at: np.ndarray  # of the pair that starts at a position, -1 for none
    batch_at: np.ndarray  # index of the merge in hand at a position, -1 for none; [-1] is -1
    pairs: np.ndarray  # left << 32 | right, of each slot
    counts: np.ndarray
    first: np.ndarray  # of the slot's occurrences in the pool
    number: np.ndarray
    size: int  # slots in use
    pool: np.ndarray
    used: int
    bits: int  # of a symbol

    @classmethod
    def of(
        cls, symbols: np.ndarray, lengths: np.ndarray, counts: np.ndarray, bits: int
    ) -> "_State":
        total = symbols.size
        ends = np.cumsum(lengths)
        after = np.arange(1, total + 1, dtype=np.int32)
        after[ends - 1] = -1
        before = np.arange(-1, total - 1, dtype=np.int32)
        before[ends - lengths] = -1
        weight = np.repeat(counts, lengths)
        at = np.flatnonzero(after >= 0).astype(np.int32)
        keys = (symbols[at].astype(np.int64) << 32) | symbols[at + 1]
        order = np.argsort(keys, kind="stable")
        at, keys = at[order], keys[order]
        edges = np.flatnonzero(_changes(keys))
        number = np.diff(edges, append=keys.size)
        slot_at = np.full(total, -1, np.int32)
        slot_at[at] = np.repeat(np.arange(edges.size, dtype=np.int32), number)
        state = cls(
            symbols=symbols.astype(np.int32),
            after=after,
            before=before,
            weight=weight,
            slot_at=slot_at,
            batch_at=np.full(total + 1, -1, np.int32),
            pairs=np.zeros(0, np.int64),
            counts=np.zeros(0, np.int64),
            first=np.zeros(0, np.int64),
            number=np.zeros(0, np.int64),
            size=0,
            pool=np.zeros(0, np.int32),
            used=0,
            bits=bits,
        )
        sums = np.add.reduceat(weight[at], edges) if edges.size else np.zeros(0, np.int64)
        state._append(keys[edges], sums, edges, number, at)
        return state

    @property
    def most(self) -> int:
        """The largest count that the order of pairs tells from larger ones."""
        return (1 << (63 - 2 * self.bits)) - 1

    def order(self, slots: np.ndarray) -> np.ndarray:
        """An integer for each pair, the smaller the sooner: by count, left and right symbol."""
        pairs = self.pairs[slots]
        symbols = (pairs >> 32 << self.bits) | (pairs & 0xFFFFFFFF)
        fewer = self.most - np.minimum(self.counts[slots], self.most)
        return (fewer << (2 * self.bits)) | symbols

    def merge(self, slots: np.ndarray, new: int, front: _Front) -> int:
        """Merges pairs, best first, to symbols new, new + 1, ...; stops before one not yet due.

        Returns:
            How many pairs were merged, at least one.
        """
        at, which = self._occurrences(slots)
        self.batch_at[at] = which
        births = _Births(self, at, which, new)
        due = births.due(self.counts[slots], self.pairs[slots])
        if due < slots.size:
            kept = which < due
            self.batch_at[at[~kept]] = -1
            births = _Births(self, at[kept], which[kept], new)
        self._apply(slots[:due], births, front)
        return due

    def _occurrences(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the pairs occur, and which of them it is."""
        number = self.number[slots]
        at = self.pool[ragged(self.first[slots], number)]
        which = np.repeat(np.arange(slots.size, dtype=np.int32), number)
        valid = self.slot_at[at] == slots[which]
        at, which = at[valid], which[valid]
        pair = int(self.pairs[slots[0]])
        if pair >> 32 == pair & 0xFFFFFFFF and at.size:  # in a run, every second from the left
            at = np.sort(at)
            opens = np.append(True, self.after[at[:-1]] != at[1:])
            start = np.flatnonzero(opens)[np.cumsum(opens) - 1]
            at = at[(np.arange(at.size) - start) % 2 == 0]
            which = which[: at.size]
        return at, which

    def _apply(self, slots: np.ndarray, births: "_Births", front: _Front) -> None:
        at, second, third, left = births.at, births.second, births.third, births.left
        gone = np.concatenate(
            [
                self.slot_at[left[births.has_left]],
                self.slot_at[second[births.has_right & (births.right_batch < 0)]],
            ]
        )
        lost = np.concatenate(
            [
                births.weight[births.has_left],
                births.weight[births.has_right & (births.right_batch < 0)],
            ]
        )
        keys, positions, order, edges, sums = births.grouped(final=True)
        np.subtract.at(self.counts, gone, lost)
        self.counts[slots] = 0
        self.symbols[at] = births.symbol
        self.after[at] = third
        self.before[third[births.has_right]] = at[births.has_right]
        self.slot_at[second] = -1
        self.slot_at[at] = -1
        self.batch_at[at] = -1
        if not keys.size:
            return
        # A pair's left position may have been merged into the one before it.
        moved = np.where(positions < 0, self.before[~positions], positions)
        number = np.diff(edges, append=keys.size)
        moved = moved[order]
        born = np.arange(self.size, self.size + edges.size, dtype=np.int32)
        self.slot_at[moved] = np.repeat(born, number)
        self._append(keys[order[edges]], sums, edges, number, moved)
        front.add(born.astype(np.int64), self.order(born))

    def _append(
        self,
        pairs: np.ndarray,
        counts: np.ndarray,
        first: np.ndarray,
        number: np.ndarray,
        at: np.ndarray,
    ) -> None:
        size = self.size + pairs.size
        for name, values in (
            ("pairs", pairs),
            ("counts", counts),
            ("first", first + self.used),
            ("number", number),
        ):
            room = grown(getattr(self, name), self.size, size)
            room[self.size : size] = values
            setattr(self, name, room)
        self.pool = grown(self.pool, self.used, self.used + at.size)
        self.pool[self.used : self.used + at.size] = at
        self.size, self.used = size, self.used + at.size


class _Births:
    """The pairs that a batch of merges gives birth to."""

    def __init__(self, state: _State, at: np.ndarray, which: np.ndarray, new: int) -> None:
        self.at, self._which, self._new, self._state = at, which, new, state
        self.symbol = new + which.astype(np.int64)
        self.weight = state.weight[at]
        self.second = state.after[at]
        self.third = state.after[self.second]
        self.left = state.before[at]
        self.has_left, self.has_right = self.left >= 0, self.third >= 0
        # The merge in hand of which the left neighbour is the second symbol, and the right one the
        # first; index -1 stands for no neighbour and holds -1.
        before = np.where(self.has_left, state.before[self.left], -1)
        self.left_batch = np.where(self.has_left, state.batch_at[before], -1)
        self.right_batch = state.batch_at[self.third]
        self._touching = bool((self.left_batch >= 0).any())
        self._grouped: dict[bool, tuple] = {}

    def grouped(
        self, final: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that are born, and how often each.

        Args:
            final: Whether neighbours merged in the same batch count as merged, which is how the
                batch ends; else those of later merges do not yet, which is how each pair is born.

        Returns:
            Keys of all births; their positions, a pair on the left of the merge at p as ~p; an
            order that sorts the keys; where each distinct key begins in that order; and its count.
        """
        final = final or not self._touching
        if final not in self._grouped:
            keys, weights, positions = self._pairs(final)
            order = np.argsort(keys, kind="stable")
            edges = np.flatnonzero(_changes(keys[order]))
            sums = np.add.reduceat(weights[order], edges) if keys.size else weights
            self._grouped[final] = keys, positions, order, edges, sums
        return self._grouped[final]

    def _pairs(self, final: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        symbols = self._state.symbols
        left, right = symbols[self.left].astype(np.int64), symbols[self.third].astype(np.int64)
        take_left, take_right = self.has_left, self.has_right
        if self._touching:
            merged_left = self.left_batch >= 0
            if final:
                take_right = take_right & (self.right_batch < 0)
            else:
                merged_left &= self.left_batch <= self._which
                merged_right = (self.right_batch >= 0) & (self.right_batch < self._which)
                right = np.where(merged_right, self._new + self.right_batch, right)
                take_right = take_right & (self.right_batch != self._which)
            left = np.where(merged_left, self._new + self.left_batch, left)
        return (
            np.concatenate(
                [
                    left[take_left] << 32 | self.symbol[take_left],
                    self.symbol[take_right] << 32 | right[take_right],
                ]
            ),
            np.concatenate([self.weight[take_left], self.weight[take_right]]),
            np.concatenate([~self.at[take_left], self.at[take_right]]),
        )

    def due(self, counts: np.ndarray, pairs: np.ndarray) -> int:
        """How many of the batch come before every pair that it gives birth to."""
        number = counts.size
        if number == 1:
            return number
        keys, _, order, edges, sums = self.grouped(final=False)
        rivals = np.flatnonzero(sums >= counts[-1])
        for edge, count in zip(edges[rivals].tolist(), sums[rivals].tolist()):
            key = int(keys[order[edge]])
            born = max((key >> 32) - self._new, (key & 0xFFFFFFFF) - self._new)
            for i in range(born + 1, number):
                if counts[i] < count or (counts[i] == count and pairs[i] > key):
                    number = i
                    break
        return number


def _changes(values: np.ndarray) -> np.ndarray:
    changes = np.ones(values.size, bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes
