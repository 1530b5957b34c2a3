"""WordPiece: each word is cut greedily into the longest pieces of a vocabulary, as BERT does."""

import dataclasses
import itertools
import operator
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxformer.tokenizers import bert_text, unicode
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.listed import Listed
from jaxformer.tokenizers.tokenizer import Ids, listed_ids, utf8
from jaxformer.tokenizers.word_ids import WordIds

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's special tokens."""

_SHORT = 256  # characters up to which a dictionary of words beats arrays
_SHORT_WORDS = 1 << 16  # bound of that dictionary
_TOO_LONG = b"\xff"  # in place of a word over the limit: no UTF-8, so never a word itself

_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WordPiece(Listed):
    """A vocabulary of words and pieces of words.

    A word is cut from left to right, each time at the longest token that goes on; all but the first
    are looked up behind the prefix. If that fails anywhere, or the word is too long, all of it is
    the unknown token. The ids are those of the Rust library's tokenizers on any text, but text
    never becomes a special token by itself, and [CLS] and [SEP] are added by `with_cls_sep`.

    Decoding is as in that library: a space before every token without the prefix. It gives back
    words, not text: case, accents, control characters, the white space between words and whether
    there was any around a punctuation mark are lost, and unknown words are "[UNK]". Special tokens
    are kept, with a space before them. Encoding the decoded text gives the same ids where no id is
    special and each word was cut greedily.

    Attributes:
        tokens: The string of each id, the prefix included; None where the id is special or unused.
        unknown: The special token of words that cannot be cut; if None they are a ValueError.
        prefix: What a token that continues a word starts with.
        max_characters: Words of more characters, after normalisation, are unknown.
        text: How text is normalised and cut into words.
        cleanup: Whether decoding drops the space before . ? ! , and English contractions that are
            tokens.

    References:
        Schuster & Nakajima 2012, "Japanese and Korean Voice Search".
        https://doi.org/10.1109/ICASSP.2012.6289079
        Wu et al. 2016, "Google's Neural Machine Translation System", section 4.1.
        https://arxiv.org/abs/1609.08144
        Devlin et al. 2018, "BERT", whose form this is: the prefix marks the pieces that continue a
        word, in the first two `_` those that start one. https://arxiv.org/abs/1810.04805
    """

    unknown: str | None = "[UNK]"
    prefix: str = "##"
    max_characters: int = 100
    text: BertText = bert_text.UNCASED
    cleanup: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters < 1:
            raise ValueError(f"max_characters is at least 1, got {self.max_characters}.")
        vars(self).update(_engine_cache=None, _known={})

    @property
    def _engine(self) -> "_Engine":
        if (engine := vars(self)["_engine_cache"]) is None:
            engine = vars(self)["_engine_cache"] = _Engine(self)
        return engine

    # Encoding.

    def _encode(self, text: str) -> list[int]:
        if len(text) > _SHORT:
            return self._encode_flat([text])[0].tolist()
        words, known = self._engine.cutter.words(text), vars(self)["_known"]
        try:
            return list(itertools.chain.from_iterable(map(known.__getitem__, words)))
        except KeyError:
            found = {word: self._engine.pieces(word) for word in dict.fromkeys(words)}
            if len(known) + len(found) > _SHORT_WORDS:
                known.clear()
            known.update(found)
            return list(itertools.chain.from_iterable(map(found.__getitem__, words)))

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        flats, ends, offset = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0
        for block, whole in bert_text.blocks(texts):
            flat, block_ends = self._encode_block(block)
            flats.append(flat)
            ends.append((block_ends + offset)[whole])
            offset += flat.size
        return np.concatenate(flats), np.concatenate(ends)

    def _encode_block(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts, one after the other, and where each text's end."""
        data, starts, sizes, characters, text_ends = self._engine.cutter.cut(texts)
        too_long = characters > self.max_characters
        if too_long.any():
            i = int(too_long.argmax())
            self._engine.pieces(data[starts[i] : starts[i] + sizes[i]].decode())  # may refuse
            starts, sizes = np.where(too_long, len(data), starts), np.where(too_long, 1, sizes)
            data += _TOO_LONG
        ((flat, word_ends),) = self._engine.words.look_up([(data, starts, sizes)])
        return flat, np.append(0, word_ends)[text_ends]

    def with_cls_sep(self, ids: Sequence[int], pair: Sequence[int] | None = None) -> list[int]:
        """Puts ids into BERT's frame: [CLS] ids [SEP], or [CLS] ids [SEP] pair [SEP].

        Raises:
            ValueError: If "[CLS]" or "[SEP]" is no special token.
        """
        cls, sep = (self._special(name) for name in ("[CLS]", "[SEP]"))
        framed = [cls, *ids, sep]
        return framed if pair is None else [*framed, *pair, sep]

    def segments(self, ids: Sequence[int]) -> list[int]:
        """The segment (`token_type_ids`) of each id: 0 up to the first [SEP], then 1.

        Raises:
            ValueError: If "[SEP]" is no special token.
        """
        sep = self._special("[SEP]")
        first = ids.index(sep) + 1 if sep in ids else len(ids)
        return [0] * first + [1] * (len(ids) - first)

    def _special(self, name: str) -> int:
        if name not in self.special_tokens:
            raise ValueError(f"{name!r} is no special token; there are: {[*self.special_tokens]}.")
        return self.special_tokens[name]

    # Decoding.

    def decode_bytes(self, ids: Ids) -> bytes:
        tokens = listed_ids(ids)
        try:
            start = b"".join(map(self._engine.first.__getitem__, tokens[:1]))
            return start + b"".join(map(self._engine.later.__getitem__, tokens[1:]))
        except KeyError:  # no id, or one that is no plain integer
            return super().decode_bytes(tokens)

    def token_bytes(self, token: SupportsIndex, *, first: bool = False) -> bytes:
        spelled = self._engine.first if first else self._engine.later
        token = operator.index(token)
        if token not in spelled:
            raise self._no_such(token)
        return spelled[token]

    # Formats.

    @classmethod
    def from_vocab_txt(
        cls,
        path: str | os.PathLike,
        *,
        text: BertText = bert_text.UNCASED,
        special_tokens: Collection[str] = SPECIAL_TOKENS,
    ) -> "WordPiece":
        """Reads BERT's vocab.txt: a token on each line, whose id is the number of lines before.

        White space at the end of a line is no part of the token; the id of an empty line is unused.

        Args:
            text: How text is normalised; the file does not say.
            special_tokens: Names that are special where the file has them; "[UNK]" is the unknown.

        Raises:
            ValueError: If the file is no UTF-8 or holds a token twice; it names the line.
        """
        lines = utf8(pathlib.Path(path).read_bytes(), str(path)).split("\n")
        if not lines[-1]:
            lines.pop()
        return cls.from_tokens(lines, text=text, special_tokens=special_tokens)

    @classmethod
    def from_tokens(
        cls,
        lines: Iterable[str],
        *,
        text: BertText = bert_text.UNCASED,
        special_tokens: Collection[str] = SPECIAL_TOKENS,
    ) -> "WordPiece":
        """Makes the tokenizer of the lines of a vocab.txt, as `from_vocab_txt` does."""
        space = _white_space()
        tokens = [line.rstrip(space) or None for line in lines]
        seen: dict[str, int] = {}
        for number, token in enumerate(tokens, 1):
            if token is not None and seen.setdefault(token, number) != number:
                raise ValueError(f"Line {number} repeats the token {token!r} of {seen[token]}.")
        specials = {name: seen[name] - 1 for name in special_tokens if name in seen}
        return cls(
            tokens=tuple(None if token in specials else token for token in tokens),
            unknown="[UNK]" if "[UNK]" in specials else None,
            special_tokens=specials,
            text=text,
        )

    def to_vocab_txt(self) -> bytes:
        """Writes BERT's vocab.txt; prefix, normalisation and limits are not in it.

        Raises:
            ValueError: If a token ends in white space or holds a line feed.
        """
        space = _white_space()
        names = {token: name for name, token in self.special_tokens.items()}
        names |= {i: token for i, token in enumerate(self.tokens) if token is not None}
        for i, name in names.items():
            if "\n" in name or name != name.rstrip(space):
                raise ValueError(f"vocab.txt cannot hold the token {i}, {name!r}.")
        return "".join(names.get(i, "") + "\n" for i in range(self.vocab_size)).encode()

    def to_json(self) -> dict[str, Any]:
        """Describes the value in the layout of `tokenizer.json`, with BERT's frame if it has one.

        Raises:
            ValueError: If a special token is spelled as an ordinary one is.
        """
        from jaxformer.tokenizers import wordpiece_json

        return wordpiece_json.write(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WordPiece":
        """Reads a `tokenizer.json`; what it adds around a text is dropped.

        Raises:
            ValueError: If it is malformed, or its normalisation, its splitting or its decoding are
                not BERT's.
        """
        from jaxformer.tokenizers import wordpiece_json

        return wordpiece_json.read(data)


class _Engine:
    """What encoding and decoding need of a tokenizer; made once and never changed.

    Attributes:
        cutter: Cuts text into words.
        first: UTF-8 of each id at the start of a text.
        later: The same of each id behind another.
    """

    def __init__(self, tokenizer: WordPiece) -> None:
        prefix, names = tokenizer.prefix, tokenizer.special_tokens
        self.cutter = bert_text.Cutter(tokenizer.text)
        self.words = WordIds(self.encode)
        self._unknown, self._limit = tokenizer.unknown_id, tokenizer.max_characters
        self._heads = tokenizer._ids
        self._tails = {
            token[len(prefix) :]: i
            for token, i in self._heads.items()
            if token.startswith(prefix) and token != prefix
        }
        self._head = max(map(len, self._heads), default=0)
        self._tail = max(map(len, self._tails), default=0)
        strings = {i: token for token, i in self._heads.items()}
        strings |= {i: name for name, i in names.items()}
        self.first = {i: _cleaned(s, tokenizer.cleanup) for i, s in strings.items()}
        self.later = {
            i: _cleaned(s[len(prefix) :] if s.startswith(prefix) else " " + s, tokenizer.cleanup)
            for i, s in strings.items()
        }

    def encode(self, octets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words, word after word, and their number for each."""
        data, bounds = octets.tobytes(), [0, *np.cumsum(sizes).tolist()]
        words = [data[start:end] for start, end in itertools.pairwise(bounds)]
        ids = [
            self._failed("") if word == _TOO_LONG else self.pieces(word.decode()) for word in words
        ]
        flat = np.array([token for some in ids for token in some], np.int32)
        return flat, np.fromiter(map(len, ids), np.int64, len(ids))

    def pieces(self, word: str) -> list[int]:
        """The ids of one word."""
        if len(word) > self._limit:
            return self._failed(word)
        if (whole := self._heads.get(word)) is not None:
            return [whole]
        ids: list[int] = []
        start, size, pieces, longest = 0, len(word), self._heads, self._head
        while start < size:
            for end in range(min(size, start + longest), start, -1):
                if (token := pieces.get(word[start:end])) is not None:
                    break
            else:
                return self._failed(word)
            ids.append(token)
            start, pieces, longest = end, self._tails, self._tail
        return ids

    def _failed(self, word: str) -> list[int]:
        if self._unknown is None:
            raise ValueError(
                f"The word {word!r:.80} of {len(word)} characters cannot be cut into tokens, and "
                "there is no unknown token."
            )
        return [self._unknown]


def _cleaned(string: str, cleanup: bool) -> bytes:
    for before, after in _CLEANUP if cleanup else ():
        string = string.replace(before, after)
    return string.encode()


def _white_space() -> str:
    return "".join(map(chr, np.flatnonzero(unicode.is_space()).tolist()))
