"""Character data of BERT's normalisation, frozen, as the Rust library's tokenizers have them.

They come from several versions of Unicode; `scripts/make_bert_tables.py` reads them off the
library.
"""

import functools
from typing import NamedTuple

import numpy as np

from jaxformer.tokenizers import frozen
from jaxformer.tokenizers.ragged import ragged

DELETED, MARK, PUNCTUATION = 1 << 8, 1 << 9, 1 << 10
"""Bits of a code point's traits; the eight below are its rank in canonical order, 0 if it stays."""

RANK = 0xFF


class Replacements(NamedTuple):
    """Code points, in order, and the ones that take the place of each."""

    keys: np.ndarray
    sizes: np.ndarray
    parts: np.ndarray

    def replace(self, codes: np.ndarray) -> np.ndarray:
        """Puts in the place of each code point what belongs there."""
        place = np.minimum(np.searchsorted(self.keys, codes), self.keys.size - 1)
        hit = self.keys[place] == codes
        place = place[hit]
        sizes = np.ones(codes.size, np.int64)
        sizes[hit] = self.sizes[place]
        first = np.cumsum(self.sizes) - self.sizes
        replaced = np.repeat(codes, sizes)
        replaced[np.repeat(hit, sizes)] = self.parts[ragged(first[place], self.sizes[place])]
        return replaced


@functools.cache
def traits() -> np.ndarray:
    """Bits and rank of every code point: uint16, read-only."""
    runs, lengths = frozen.read("bert_traits")
    table = np.repeat(runs, lengths)
    table.setflags(write=False)
    return table


@functools.cache
def upper() -> Replacements:
    """What lowering makes of letters, each by itself."""
    keys, sizes, parts = frozen.read("bert_upper")
    return Replacements(keys, sizes.astype(np.int64), parts)


@functools.cache
def composed() -> Replacements:
    """Full canonical decompositions; those of Hangul syllables are arithmetic.

    References:
        The Unicode Standard 16.0, section 3.12, "Hangul Syllable Decomposition".
    """
    keys, sizes, parts = frozen.read("bert_composed")
    index = np.arange(11172)
    jamo = np.stack([0x1100 + index // 588, 0x1161 + index // 28 % 21, 0x11A7 + index % 28], 1)
    has_last = index % 28 > 0
    hangul = jamo[np.stack([has_last | True, has_last | True, has_last], 1)]
    place = int(np.searchsorted(keys, 0xAC00))
    before = int(sizes[:place].sum())
    return Replacements(
        np.concatenate([keys[:place], 0xAC00 + index, keys[place:]]).astype(np.int32),
        np.concatenate([sizes[:place], 2 + has_last, sizes[place:]]).astype(np.int64),
        np.concatenate([parts[:before], hangul, parts[before:]]).astype(np.int32),
    )
