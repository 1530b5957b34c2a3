"""Words of k letters over an alphabet: side by side, or one ending at each letter."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.tokenizers import listed
from jaxformer.tokenizers.alphabets import Alphabet
from jaxformer.tokenizers.tokenizer import Ids, Tokenizer


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Kmers(Tokenizer):
    """Sequences as words of k letters, lossless on the alphabet.

    Ids are the alphabet's, then the words in the order of `letters` ("AA", "AC", ... "TT"). Every
    other letter of the alphabet, such as N or a gap, is one token by itself and parts the stretches
    that words are in.

    Side by side, each stretch is cut into words from its left, and the fewer than k letters that
    remain at its right are single tokens.

    Overlapping, every letter gives one token, so that tokens and letters have the same positions:
    the word that ends there, or the letter alone where fewer than k of its stretch have been seen.
    A word so stands for its last letter and knows the k - 1 before it, and decodes as that letter.

    Attributes:
        alphabet: Gives the single letters; its special tokens are usually this one's too.
        k: Letters in a word.
        letters: What words are made of.
        overlap: Whether a word ends at each letter, or words stand side by side.

    References:
        Side by side: Dalla-Torre et al. 2025, "Nucleotide Transformer", Methods, "Tokenization".
        https://doi.org/10.1038/s41592-024-02523-z
        Overlapping: Ji et al. 2021, "DNABERT", section 2.1.
        https://doi.org/10.1093/bioinformatics/btab083 (which has no token for the first k - 1
        letters, so that our tokens from the k-th on are its own, and one unknown token for N).
    """

    alphabet: Alphabet
    k: int
    letters: str
    overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 2:
            raise ValueError(f"Kmers needs k >= 2, got k={self.k}.")
        if not self.letters or len(set(self.letters)) < len(self.letters):
            raise ValueError(f"The letters of words are to be different, got {self.letters!r}.")
        for letter in self.letters:
            if letter not in self.alphabet.tokens:
                raise ValueError(f"The letter {letter!r} of words is not in the alphabet.")
        if self.vocab_size > 2**31 - 1:
            raise ValueError(f"k={self.k} needs {self.vocab_size} ids, more than 32 bits hold.")
        listed.check_special_ids(self.alphabet.tokens, self.special_tokens)
        for name, token in self.special_tokens.items():
            if token >= self.alphabet.vocab_size:
                raise ValueError(f"The id {token} of the special token {name!r} is a word's.")

    @property
    def vocab_size(self) -> int:
        return self.alphabet.vocab_size + len(self.letters) ** self.k

    @property
    def unknown_id(self) -> int | None:
        """The id of the alphabet's unknown token, if there is one."""
        return self.alphabet.unknown_id

    def _encode(self, text: str) -> list[int]:
        return self._words(self.alphabet.encode_array(text)).tolist()

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        flat, ends = self.alphabet._encode_flat(texts)
        parts = [self._words(part) for part in np.split(flat, ends[:-1])] if texts else []
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return np.concatenate([np.zeros(0, np.int32), *parts]), ends

    def _words(self, singles: np.ndarray) -> np.ndarray:
        """The tokens of the alphabet's tokens."""
        if len(singles) < self.k:
            return singles
        digits = self._digits[singles]
        gaps = np.flatnonzero(digits < 0) if digits.min() < 0 else np.zeros(0, np.int64)
        return (self._overlapping if self.overlap else self._side_by_side)(singles, digits, gaps)

    def _overlapping(self, singles: np.ndarray, digits: np.ndarray, gaps: np.ndarray) -> np.ndarray:
        words, width = digits, 1  # word i is of the letters from i on
        for bit in f"{self.k:b}"[1:]:
            words = words[:-width] * np.int32(len(self.letters) ** width) + words[width:]
            width *= 2
            if bit == "1":
                words = words[:-1] * np.int32(len(self.letters)) + digits[width:]
                width += 1
        tokens = np.empty_like(singles)
        tokens[: self.k - 1] = singles[: self.k - 1]
        np.add(words, self.alphabet.vocab_size, out=tokens[self.k - 1 :])
        for j in range(self.k):  # words with a gap in them
            places = gaps[: np.searchsorted(gaps, len(singles) - j)] + j
            tokens[places] = singles[places]
        return tokens

    def _side_by_side(
        self, singles: np.ndarray, digits: np.ndarray, gaps: np.ndarray
    ) -> np.ndarray:
        first = np.concatenate([[0], gaps + 1])  # of each stretch
        counts = (np.concatenate([gaps, [len(singles)]]) - first) // self.k
        before = np.cumsum(counts) - counts
        starts = np.repeat(first - self.k * before, counts) + self.k * np.arange(counts.sum())
        words = np.zeros(len(starts), np.int32)
        for j in range(self.k):
            words = words * np.int32(len(self.letters)) + digits[starts + j]
        tokens, keep = singles.copy(), np.ones(len(singles), bool)
        tokens[starts] = words + self.alphabet.vocab_size
        for j in range(1, self.k):
            keep[starts + j] = False
        return tokens[keep]

    @property
    def _digits(self) -> np.ndarray:
        """The place among `letters` of each id of the alphabet, -1 where it has none."""
        digits = vars(self).get("_digits_cache")
        if digits is None:
            digits = np.full(self.alphabet.vocab_size, -1, np.int32)
            digits[self.alphabet.encode(self.letters)] = np.arange(len(self.letters))
            vars(self)["_digits_cache"] = digits
        return digits

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into letters."""
        tokens = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if tokens.dtype.kind not in "iu" or tokens.min(initial=0) < 0:
            return super().decode_bytes(tokens)
        if tokens.max(initial=0) >= self.vocab_size:
            return super().decode_bytes(tokens)
        base, count = self.alphabet.vocab_size, len(self.letters)
        singles = self._single_codes[np.minimum(tokens, base)]
        if not singles.all():  # a special token, or an unused id
            return super().decode_bytes(tokens)
        codes = np.frombuffer(self.letters.encode(), np.uint8)
        single, words = tokens < base, np.maximum(tokens.astype(np.int64) - base, 0)
        if self.overlap:
            return np.where(single, singles, codes[words % count]).tobytes()
        text = np.empty((len(tokens), self.k), np.uint8)
        for j in reversed(range(self.k)):
            text[:, j] = codes[words % count]
            words = words // count
        text[single, 0] = singles[single]
        written = np.ones(text.shape, bool)
        written[single, 1:] = False
        return text[written].tobytes()

    @property
    def _single_codes(self) -> np.ndarray:
        """The ASCII code of each of the alphabet's ids, 0 where it has none; then a 1 for words."""
        codes = vars(self).get("_single_codes_cache")
        if codes is None:
            tokens = (*self.alphabet.tokens, *(None,) * self.alphabet.vocab_size)
            tokens = tokens[: self.alphabet.vocab_size]
            codes = np.array([*(0 if x is None else ord(x) for x in tokens), 1], np.uint8)
            vars(self)["_single_codes_cache"] = codes
        return codes

    def _piece(self, token: int, first: bool) -> bytes:
        if token < self.alphabet.vocab_size:
            return self.alphabet._piece(token, first)
        if token >= self.vocab_size:
            raise KeyError(token)
        word, letters = token - self.alphabet.vocab_size, []
        for _ in range(1 if self.overlap else self.k):
            word, digit = divmod(word, len(self.letters))
            letters.append(self.letters[digit])
        return "".join(reversed(letters)).encode()

    def to_json(self) -> dict[str, Any]:
        return {
            "jaxformer": "kmers",
            "alphabet": self.alphabet.to_json(),
            "k": self.k,
            "letters": self.letters,
            "overlap": self.overlap,
            "special_tokens": dict(self.special_tokens),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Kmers":
        """Reads what `to_json` wrote; raises ValueError if it is malformed."""
        types: dict[str, Any] = {"alphabet": dict, "k": int, "letters": str, "overlap": bool}
        found = listed.fields(data, "kmers", special_tokens=dict, **types)
        return cls(**{**found, "alphabet": Alphabet.from_json(found["alphabet"])})


def kmers(alphabet: Alphabet, k: int, *, letters: str, overlap: bool = False) -> Kmers:
    """Makes words of k of the given letters, with the special tokens of the alphabet.

    Args:
        alphabet: As `alphabets.dna()`; gives the tokens of single letters.
        k: Letters in a word; there are `len(letters) ** k` words.
        letters: What words are made of: "ACGT" for DNA.
        overlap: Whether a word ends at each letter, or words stand side by side.
    """
    return Kmers(
        alphabet=alphabet,
        k=k,
        letters=letters,
        overlap=overlap,
        special_tokens=alphabet.special_tokens,
    )
