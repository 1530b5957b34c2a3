"""The merges behind a list of ranked tokens, which is all that a `.tiktoken` file holds."""

import itertools
from collections.abc import Sequence

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2**64
_ABSENT = -1


def merges_of_ranks(tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the pair that each token is merged from, given the tokens in order of rank.

    Byte pair encoding by ranks merges any two neighbours whose bytes joined are a token. If merging
    the bytes of a token by lower ranks alone arrives at two parts, the token is never made of
    anything else: this pair is its merge. Where it does not, as in vocabularies that were edited by
    hand, every way to join the token of two others is given.

    All tokens of one length are looked at at once. A split into two tokens is the right one if
    nothing of a lower rank reaches across it at any time: both parts are taken apart again, the
    later merge first, along the right edge of the left part and the left edge of the right part,
    and each two symbols that meet at the split on the way must not make a token before one of them
    is merged away.

    Args:
        tokens: Distinct byte strings; the index is the rank.

    Returns:
        Ranks of left and right part of each merge (M, 2) as int32, in order of the results' ranks,
        and the ranks (K,) of tokens longer than a byte that merging lower ranks does not arrive at.

    References:
        van Antwerpen and Neubeck 2024, "So many tokens, so little time", whose test of two
        neighbouring tokens this is. https://github.blog/ai-and-ml/llms/so-many-tokens-so-little-time/
    """
    spelling = _Spelling(tokens)
    lengths = spelling.lengths
    whole, left, right = spelling.splits()
    parts = np.full((2, len(tokens)), _ABSENT)
    # A single byte is there from the start, whatever its rank; what is not reached never is.
    times = np.where(lengths == 1, -1, np.arange(len(tokens)))
    reached = lengths == 1
    earlier = (times[left] < whole) & (times[right] < whole)
    order = np.argsort(lengths[whole], kind="stable")
    bounds = np.searchsorted(lengths[whole][order], np.arange(2, lengths.max(initial=1) + 2))
    for first, last in itertools.pairwise(bounds.tolist()):
        rows = order[first:last]
        rows = rows[earlier[rows] & reached[left[rows]] & reached[right[rows]]]
        kept = rows[_untouched(spelling, times, parts, whole[rows], left[rows], right[rows])]
        parts[0, whole[kept]], parts[1, whole[kept]] = left[kept], right[kept]
        reached[whole[kept]] = True
    used = (~reached[whole]) | ((parts[0, whole] == left) & (parts[1, whole] == right))
    used = np.flatnonzero(used)
    used = used[np.argsort(whole[used], kind="stable")]
    return np.stack([left[used], right[used]], 1).astype(np.int32), np.flatnonzero(~reached)


def _untouched(
    spelling: "_Spelling",
    times: np.ndarray,
    parts: np.ndarray,
    whole: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """Which of these splits no merge before `whole` reaches across."""
    fine = np.ones(whole.size, bool)
    rows = np.arange(whole.size)
    while rows.size:
        left_time, right_time = times[left], times[right]
        going = np.maximum(left_time, right_time) >= 0
        rows, left, right = rows[going], left[going], right[going]
        left_time, right_time = left_time[going], right_time[going]
        # Of two equal tokens the left one was merged first, and is the last to be taken apart.
        on_left = left_time > right_time
        # A pair of the same rank across the split lies to the right of what made `left`, and to
        # the left of what made `right`: there it wins.
        limit = np.where(on_left, left_time, right_time + 1)
        left = np.where(on_left, parts[1, left], left)
        right = np.where(on_left, right, parts[0, right])
        crossing = spelling.joined(left, right)
        free = (crossing == _ABSENT) | (crossing >= limit)
        fine[rows[~free]] = False
        rows, left, right = rows[free], left[free], right[free]
    return fine


class _Spelling:
    """Looks tokens up by a polynomial of their bytes modulo 2**64, which joins by one product.

    Two different byte strings agree with probability 2**-64; `splits` compares the bytes.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self.lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        longest = int(self.lengths.max(initial=1))
        self._powers = _powers(_BASE, longest)
        ends = np.cumsum(self.lengths)
        self._starts = ends - self.lengths
        data = np.frombuffer(b"".join(tokens), np.uint8)
        values = np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64)[data]
        place = np.arange(data.size) - np.repeat(self._starts, self.lengths)
        # Sums of prefixes; those of one token are differences, as the arithmetic wraps around.
        self._sums = np.append(np.uint64(0), np.cumsum(values * self._powers[place]))
        self._keys = self._sums[ends] - self._sums[self._starts]
        self._fill()

    def _fill(self) -> None:
        bits = max(4, int(4 * self._keys.size).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.full(1 << bits, _ABSENT, np.int32)
        waiting = np.arange(self._keys.size)
        slots = self._slots(self._keys)
        while waiting.size:
            free = self._table[slots] == _ABSENT
            self._table[slots[free]] = waiting[free]
            lost = self._table[slots] != waiting
            waiting, slots = waiting[lost], (slots[lost] + 1) % self._table.size

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * np.uint64(_BASE)) >> self._shift).astype(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The token of each key, or -1."""
        slots = self._slots(keys)
        found = self._table[slots]
        open_rows = np.flatnonzero((found != _ABSENT) & (self._keys[found] != keys))
        while open_rows.size:
            slots[open_rows] = (slots[open_rows] + 1) % self._table.size
            token = self._table[slots[open_rows]]
            found[open_rows] = token
            open_rows = open_rows[(token != _ABSENT) & (self._keys[token] != keys[open_rows])]
        return found

    def joined(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The token that each two tokens make together, or -1."""
        size = self.lengths[left]
        # Nothing longer than the longest token is one.
        shift = self._powers[np.minimum(size, self._powers.size - 1)]
        return self.find(self._keys[left] + self._keys[right] * shift)

    def splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ways to write a token as two: the whole, the left and the right of each."""
        cuts = np.maximum(self.lengths - 1, 0)
        whole = np.repeat(np.arange(cuts.size), cuts)
        place = np.arange(whole.size) - np.repeat(np.cumsum(cuts) - cuts, cuts) + 1
        start = self._starts[whole]
        middle = self._sums[start + place]
        left = self.find(middle - self._sums[start])
        rows = np.flatnonzero(left != _ABSENT)
        whole, place, middle, left = whole[rows], place[rows], middle[rows], left[rows]
        end = self._sums[self._starts[whole] + self.lengths[whole]]
        inverse = _powers(pow(_BASE, -1, 1 << 64), self._powers.size - 1)
        right = self.find((end - middle) * inverse[place])
        rows = np.flatnonzero(right != _ABSENT)
        whole, left, right = whole[rows], left[rows], right[rows]
        tokens = self.tokens
        same = [
            tokens[b] + tokens[c] == tokens[a]
            for a, b, c in zip(whole.tolist(), left.tolist(), right.tolist())
        ]
        rows = np.flatnonzero(same)
        return whole[rows], left[rows].astype(np.int64), right[rows].astype(np.int64)


def _powers(base: int, highest: int) -> np.ndarray:
    """base**0 to base**highest, modulo 2**64."""
    factors = np.full(highest + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
