"""Tokenizers of biological sequences: one id for each letter, and k-mers of letters.

Lower case means a soft mask in genomes: a letter that is there but repeats. What becomes of it is
said when an alphabet is made: it is refused, read as upper case, or kept apart.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.tokenizers import listed
from jaxformer.tokenizers.plain import Characters

_AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
_NUCLEOTIDES = "ACGTRYSWKMBDHVN-."
_COMPLEMENTS = "TGCAYRSWMKVHDBN-."

CASES = ("refuse", "fold", "keep")
"""What becomes of lower case."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Alphabet(Characters):
    """Sequences of ASCII letters, one id each: lossless, and a ValueError for any other character.

    With an unknown token other characters become that, as visible as its name; spaces and line
    ends are such characters too.

    Attributes:
        fold_case: Whether lower case is read as the upper case letter, which then is what is
            decoded; otherwise it has to be in the alphabet itself.
    """

    fold_case: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for token, letter in enumerate(self.tokens):
            if letter is not None and not letter.isascii():
                raise ValueError(f"The token {token} is no ASCII letter: {letter!r}.")
            if self.fold_case and letter is not None and letter.islower():
                raise ValueError(f"fold_case leaves the token {token}, {letter!r}, without a use.")

    def encode_framed(
        self,
        texts: Sequence[str],
        *,
        start: str = "<cls>",
        end: str = "<eos>",
        pad: str = "<pad>",
        length: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes sequences between two special tokens, as ESM takes them.

        Args:
            texts: B sequences.
            start: The special token before each sequence.
            end: The one after it; a sequence that is cut keeps it.
            pad: The one that fills up on the right.
            length: Columns T, at least 2; as many as the longest sequence needs if None.

        Returns:
            Ids (B, T) as int32 and the lengths (B,) as int32, in tokens, with the two.
        """
        for name in (start, end, pad):
            if name not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise ValueError(f"{name!r} is no special token; there are: {known}.")
        if length is not None and length < 2:
            raise ValueError(f"encode_framed needs length >= 2, got {length}.")
        inside, lengths = self.encode_padded(
            texts, pad=self.special_tokens[pad], length=None if length is None else length - 2
        )
        ids = np.pad(inside, ((0, 0), (1, 1)), constant_values=self.special_tokens[pad])
        ids[:, 0] = self.special_tokens[start]
        ids[np.arange(len(ids)), lengths + 1] = self.special_tokens[end]
        return ids, lengths + np.int32(2)

    def _code_ids(self) -> dict[int, int]:
        codes = super()._code_ids()
        if self.fold_case:
            codes |= {ord(chr(code).lower()): token for code, token in codes.items()}
        return codes

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "fold_case": self.fold_case}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Alphabet":
        """Reads what `to_json` wrote; raises ValueError if it is malformed."""
        types = {"unknown": (str, type(None)), "fold_case": bool}
        return cls(**listed.fields(data, "alphabet", tokens=list, special_tokens=dict, **types))


def protein(*, unknown: str | None = None, fold_case: bool = False) -> Alphabet:
    """Makes ESM's alphabet: its 33 tokens in its order.

    The 20 amino acids by frequency, X (any), B, U, Z, O, the gaps `.` and `-`, and the special
    tokens `<cls> <pad> <eos> <unk> <null_1> <mask>`. Text is encoded as it stands:
    `encode_framed` adds `<cls>` and `<eos>`.

    Args:
        unknown: "<unk>" to read other characters as ESM does; None to refuse them.
        fold_case: Whether lower case is read as upper case; ESM reads it as unknown.

    References:
        Rives et al. 2021, https://doi.org/10.1073/pnas.2016239118; `proteinseq_toks` in the file
        `esm/constants.py` of the authors' repository.
    """
    tokens = (None,) * 4 + tuple(_AMINO_ACIDS) + (None, None)
    specials = {"<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, "<null_1>": 31, "<mask>": 32}
    return Alphabet(tokens=tokens, special_tokens=specials, unknown=unknown, fold_case=fold_case)


def dna(
    *, lower: str = "refuse", special_tokens: Sequence[str] = (), unknown: str | None = None
) -> Alphabet:
    """Makes the alphabet of DNA: A, C, G, T, the codes of ambiguity and the gaps `-` and `.`.

    Ids: the special tokens as given, then `ACGT RYSWKMBDHVN -.`, then these letters in lower case
    if they are kept.

    Args:
        lower: "refuse" lower case, "fold" it into upper case, which loses the soft mask, or "keep"
            it as letters of its own, without loss.
        special_tokens: Names that are in no sequence.
        unknown: The one of them that stands for other characters; None to refuse them.

    Raises:
        ValueError: If `lower` is none of these, a special token is named twice, or `unknown` is
            none of them.

    References:
        Cornish-Bowden 1985, "Nomenclature for incompletely specified bases in nucleic acid
        sequences", table 1. https://doi.org/10.1093/nar/13.9.3021
    """
    return _nucleotides(_NUCLEOTIDES, lower, special_tokens, unknown)


def rna(
    *, lower: str = "refuse", special_tokens: Sequence[str] = (), unknown: str | None = None
) -> Alphabet:
    """Makes the alphabet of RNA: that of `dna` with U in the place of T, which is refused."""
    return _nucleotides(_NUCLEOTIDES.replace("T", "U"), lower, special_tokens, unknown)


def reverse_complement(sequence: str, *, rna: bool = False) -> str:
    """Reads the other strand: complements each letter, ambiguity and case kept, and turns around.

    Raises:
        ValueError: If a character is none of DNA, or of RNA if `rna`.
    """
    old, new = ((x.replace("T", "U") if rna else x) for x in (_NUCLEOTIDES, _COMPLEMENTS))
    table = np.zeros(256, np.uint8)
    for letters, complements in ((old, new), (old.lower(), new.lower())):
        table[list(letters.encode())] = list(complements.encode())
    codes = np.frombuffer(sequence.encode("ascii", "replace"), np.uint8)
    strand = table[codes]
    if not strand.all():
        place = int(np.argmin(strand))
        kind = "RNA" if rna else "DNA"
        raise ValueError(f"{sequence[place]!r} at character {place} is no letter of {kind}.")
    return strand[::-1].tobytes().decode()


def _nucleotides(
    letters: str, lower: str, special_tokens: Sequence[str], unknown: str | None
) -> Alphabet:
    if lower not in CASES:
        raise ValueError(f"lower is one of {', '.join(CASES)}, got {lower!r}.")
    if lower == "keep":
        letters += "".join(letter.lower() for letter in letters if letter.isalpha())
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"A special token is named twice: {list(special_tokens)}.")
    return Alphabet(
        tokens=(None,) * len(special_tokens) + tuple(letters),
        special_tokens={name: token for token, name in enumerate(special_tokens)},
        unknown=unknown,
        fold_case=lower == "fold",
    )
