"""BERT's normalisation of text and how it cuts text into words."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxformer.tokenizers import bert_tables, cutting, unicode
from jaxformer.tokenizers.bert_tables import DELETED, MARK, PUNCTUATION, RANK
from jaxformer.tokenizers.ragged import ragged

IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),  # as in the Rust library; Google's code starts at U+2B820
    (0x2F800, 0x2FA1F),
)
"""First and last of the ranges whose characters are words by themselves."""

_WORD, _ALONE, _SPACE = range(3)  # a normalised character: of a word, one by itself, between
_BREAK = 0xDFFF  # stands between texts: no text holds it
_BLOCK = 1 << 20  # characters that are cut at once
_CUT = re.compile("[ \n!-/:-@、。，]")  # whatever the options: no word goes on across these
_SPELLED = 1 << 16  # bound of the characters that a `Cutter` keeps spelled


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertText:
    """How BERT prepares text: the words are those of the Rust library's tokenizers, on any text.

    In this order: control characters go, ideographs become words, accents go, letters are lowered;
    then white space separates words, and each punctuation mark is a word. Lowering is letter by
    letter: a Greek sigma at the end of a word becomes σ. The character data are those of the Rust
    library, from several versions of Unicode: marks that are newer than Unicode 9 stay.

    Attributes:
        lowercase: Whether letters are lowered.
        strip_accents: Whether characters are decomposed and nonspacing marks dropped; None follows
            `lowercase`.
        clean: Whether control, format and private-use characters and U+FFFD are dropped. White
            space separates words in any case.
        chinese: Whether each of the `IDEOGRAPHS` is a word by itself.

    References:
        Devlin et al. 2018, "BERT". https://arxiv.org/abs/1810.04805, whose code differs: it keeps
        private-use characters, follows the Unicode version of Python, and knows U+2B820 to U+2B91F
        as ideographs.
    """

    lowercase: bool = True
    strip_accents: bool | None = None
    clean: bool = True
    chinese: bool = True

    @property
    def strips(self) -> bool:
        """Whether accents are dropped."""
        return self.lowercase if self.strip_accents is None else self.strip_accents


UNCASED, CASED = BertText(), BertText(lowercase=False)
"""The text of BERT's uncased and cased models."""


class Words(NamedTuple):
    """Texts cut into words.

    Attributes:
        data: UTF-8 that holds the words.
        starts: First byte of each word.
        sizes: Bytes of each word.
        characters: Number of characters of each word.
        ends: How many words there are up to the end of each text.
    """

    data: bytes
    starts: np.ndarray
    sizes: np.ndarray
    characters: np.ndarray
    ends: np.ndarray


class Cutter:
    """Cuts text into words, as `BertText` says; holds tables, which it makes when first needed."""

    def __init__(self, text: BertText) -> None:
        self._text = text
        codes = np.arange(128, dtype=np.int32)
        deleted = (bert_tables.traits()[codes] & DELETED > 0) & text.clean
        mapped = np.arange(256, dtype=np.uint8)
        mapped[codes[~deleted]] = self._stages(codes)
        classes = np.zeros(256, np.uint8)
        self._classes = self._class_table()
        classes[:128] = self._classes[:128]
        classes[0xFF] = _SPACE
        self._ascii_map = mapped.tobytes(), bytes(codes[deleted].tolist())
        self._ascii_classes = classes.tobytes()
        self._spelled = _Spelled(self)

    def words(self, text: str) -> list[str]:
        """The words of one short text."""
        try:
            return [word for word in text.translate(self._spelled).split(" ") if word]
        except _OrderMatters:
            data, starts, sizes, _, _ = self.cut([text])
            bounds = zip(starts.tolist(), (starts + sizes).tolist())
            return [data[start:end].decode() for start, end in bounds]

    def cut(self, texts: Sequence[str]) -> Words:
        """Cuts texts at once; `blocks` keeps them to a size that this is fast for."""
        if all(map(str.isascii, texts)):
            return self._cut_ascii(texts)
        joined = chr(_BREAK).join(texts).encode("utf-32-le", "surrogatepass")
        codes = self._normal(np.frombuffer(joined, "<i4"))
        starts, ends = _bounds(self._classes[codes])
        gaps = np.flatnonzero(codes == _BREAK) if len(texts) > 1 else starts[:0]
        data = codes.tobytes().decode("utf-32-le", "surrogatepass").encode("utf-8", "surrogatepass")
        first = np.append(np.flatnonzero(np.frombuffer(data, np.int8) >= -64), len(data))
        begins = first[starts]
        text_ends = np.append(np.searchsorted(starts, gaps), starts.size)
        return Words(data, begins, first[ends] - begins, ends - starts, text_ends[: len(texts)])

    def joins(self, codes: np.ndarray) -> np.ndarray:
        """Whether normalised characters, as code points, can stand in a word with others."""
        return self._classes[codes] == _WORD

    def _cut_ascii(self, texts: Sequence[str]) -> Words:
        data = b"\xff".join([text.encode() for text in texts]).translate(*self._ascii_map)
        starts, ends = _bounds(np.frombuffer(data.translate(self._ascii_classes), np.uint8))
        gaps = starts[:0]
        if len(texts) > 1:
            gaps = np.flatnonzero(np.frombuffer(data, np.uint8) == 0xFF)
        sizes = ends - starts
        text_ends = np.append(np.searchsorted(starts, gaps), starts.size)
        return Words(data, starts, sizes, sizes, text_ends[: len(texts)])

    def _normal(self, codes: np.ndarray) -> np.ndarray:
        """Normalises code points, through one table that does all steps at once."""
        wide = self._wide
        normal = wide.single[codes]
        which = np.flatnonzero(normal < 0)
        if not which.size:
            return normal
        entry = -1 - normal[which]
        if wide.moves[entry].any():
            return self._stages(codes)
        sizes = np.ones(codes.size, np.int64)
        sizes[which] = wide.sizes[entry]
        normal = np.repeat(normal, sizes)
        normal[normal < 0] = wide.parts[ragged(wide.first[entry], wide.sizes[entry])]
        return normal

    def _stages(self, codes: np.ndarray) -> np.ndarray:
        """Normalises code points step by step."""
        traits, text = bert_tables.traits(), self._text
        if text.clean:
            codes = codes[traits[codes] & DELETED == 0]
        if text.strips:
            codes = bert_tables.composed().replace(codes)
            rank = (traits[codes] & RANK).astype(np.int64)
            codes = codes[np.argsort((np.cumsum(rank == 0) << 8) + rank, kind="stable")]
            codes = codes[traits[codes] & MARK == 0]
        return bert_tables.upper().replace(codes) if text.lowercase else codes

    def _class_table(self) -> np.ndarray:
        """Whether a normalised character is of a word, a word by itself, or white space."""
        classes = (bert_tables.traits() & PUNCTUATION > 0).astype(np.uint8)
        for first, last in IDEOGRAPHS if self._text.chinese else ():
            classes[first : last + 1] = _ALONE
        classes[unicode.is_space()] = _SPACE
        classes[_BREAK] = _SPACE
        return classes

    @property
    def _wide(self) -> "_Wide":
        made = self.__dict__.get("_wide_cache")
        if made is None:
            made = self.__dict__["_wide_cache"] = self._make_wide()
        return made

    def _make_wide(self) -> "_Wide":
        """Collects what becomes of each code point by itself."""
        traits, text = bert_tables.traits(), self._text
        changed = np.zeros(0x110000, bool)
        if text.strips:
            changed[bert_tables.composed().keys] = True
            changed |= traits & (MARK | RANK) > 0
        if text.lowercase:
            changed[bert_tables.upper().keys] = True
        deleted = (traits & DELETED > 0) & text.clean
        keys = np.flatnonzero(changed & ~deleted).astype(np.int32)
        between = np.full(2 * keys.size, ord(" "), np.int32)
        between[::2] = keys
        parts = self._stages(between)
        ends = np.flatnonzero(parts == ord(" "))
        sizes = np.diff(ends, prepend=-1) - 1
        first = ends - sizes
        ranked = np.append(0, np.cumsum(traits[parts] & RANK > 0))
        moves = (ranked[ends] > ranked[first]) & text.strips

        single = np.arange(0x110000, dtype=np.int32)
        plain = (sizes == 1) & ~moves
        single[keys[plain]] = parts[first[plain]]
        single[keys[~plain]] = -1 - np.flatnonzero(~plain)
        single[deleted] = -1 - keys.size
        first, sizes, moves = (np.append(array, 0) for array in (first, sizes, moves))
        return _Wide(single, first, sizes, parts, moves > 0)


class _Wide(NamedTuple):
    """What becomes of each code point.

    Attributes:
        single: The one character that takes its place, or -1 - i for the entry i below.
        first, sizes: Where in `parts` an entry's characters lie, and how many.
        parts: The characters of all entries.
        moves: Whether a mark remains of an entry that may have to change places with another.
    """

    single: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    parts: np.ndarray
    moves: np.ndarray


class _OrderMatters(Exception):
    """A text holds marks that may have to change places: it cannot be taken letter by letter."""


class _Spelled(dict[int, str]):
    """What becomes of a character, spaces around what is a word by itself; for `str.translate`."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter

    def __missing__(self, code: int) -> str:
        wide = self._cutter._wide
        normal = int(wide.single[code])
        if normal < 0 and wide.moves[-1 - normal]:
            raise _OrderMatters
        codes = self._cutter._normal(np.array([code], np.int32))
        spelled = ""
        for char, kind in zip(map(chr, codes.tolist()), self._cutter._classes[codes].tolist()):
            spelled += (char, f" {char} ", " ")[kind]
        if len(self) >= _SPELLED:
            self.clear()
        self[code] = spelled
        return spelled


def blocks(texts: Sequence[str]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Groups texts into blocks of bounded size; see `cutting.blocks`."""
    return cutting.blocks(texts, _BLOCK, _CUT)


def _bounds(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and where they end."""
    word = np.concatenate([[False], classes == _WORD, [False]])
    alone = classes == _ALONE
    starts = np.flatnonzero((word[1:-1] & ~word[:-2]) | alone)
    ends = np.flatnonzero((word[1:-1] & ~word[2:]) | alone) + 1
    return starts, ends
