"""The simple tokenizers, which the others are compared with: bytes, characters and words."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.tokenizers import listed, patterns, unicode
from jaxformer.tokenizers.listed import Listed
from jaxformer.tokenizers.tokenizer import Ids, Texts, Tokenizer, documents, listed_ids

WORDS = patterns.Pattern(r" ?\S+|\s+?(?= \S)|\s+")
"""Cuts text into words, each with the one space before it, and what other white space there is."""


class Bytes(Tokenizer):
    """Text as the 256 bytes of its UTF-8: an id is a byte, special tokens come after.

    Lossless on any bytes: `decode_bytes(encode_bytes(data))` is `data`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        listed.check_special_ids((" ",) * 256, self.special_tokens)

    @property
    def vocab_size(self) -> int:
        return max([256, *(token + 1 for token in self.special_tokens.values())])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes any bytes, whether they are UTF-8 or not."""
        return list(data)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [text.encode() for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return np.frombuffer(b"".join(parts), np.uint8).astype(np.int32), ends

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into bytes, without loss."""
        tokens = listed_ids(ids)
        try:
            return bytes(tokens)
        except ValueError:  # a special token, or no token at all
            return super().decode_bytes(tokens)

    def _piece(self, token: int, first: bool) -> bytes:
        if token > 255:
            raise KeyError(token)
        return bytes([token])

    def to_json(self) -> dict[str, Any]:
        return {"jaxformer": "bytes", "special_tokens": dict(self.special_tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Bytes":
        """Reads what `to_json` wrote; raises ValueError if it is malformed."""
        return cls(**listed.fields(data, "bytes", special_tokens=dict))


class Characters(Listed):
    """Text as Unicode characters: one id for each code point."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for token, string in enumerate(self.tokens):
            if string is not None and len(string) != 1:
                raise ValueError(f"The token {token} is not one character: {string!r}.")

    @classmethod
    def train(
        cls,
        texts: Texts,
        *,
        vocab_size: int | None = None,
        min_frequency: int = 1,
        special_tokens: Sequence[str] = (),
        unknown: str | None = None,
    ) -> "Characters":
        """Lists the characters of texts.

        Ids: the special tokens as given (then the unknown token, if it is not among them), then
        the characters, the most frequent first and those of one frequency by code point. So a
        smaller vocabulary is the beginning of a larger one.

        Args:
            texts: What to count.
            vocab_size: At most so many ids; no limit if None.
            min_frequency: Characters that occur less often are left out.
            special_tokens: Names that are in no text.
            unknown: Stands for the characters that are left out.

        Raises:
            ValueError: If a character would be left out and there is no unknown token, or
                `vocab_size` does not hold the special tokens.
        """
        counts: collections.Counter[str] = collections.Counter()
        for text in documents(texts):
            counts.update(text)
        return cls(
            **listed.most_frequent(counts, (), vocab_size, min_frequency, special_tokens, unknown)
        )

    def _encode(self, text: str) -> list[int]:
        if len(text) > 100:  # below it, a dictionary is faster than arrays
            return self._encode_flat([text])[0].tolist()
        table, unknown = self._by_code, self.unknown_id
        if unknown is not None:
            return [table.get(ord(character), unknown) for character in text]
        try:
            return [table[ord(character)] for character in text]
        except KeyError as error:
            character = chr(error.args[0])
            raise self._unlisted(character, text.index(character)) from None

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        text = texts[0] if len(texts) == 1 else "".join(texts)
        table = self._by_code_table
        if text.isascii():
            tokens = table[np.frombuffer(text.encode(), np.uint8)]
        else:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            tokens = table[np.minimum(codes, len(table) - 1)]
        if self.unknown is None and tokens.min(initial=0) < 0:
            place = int(np.argmax(tokens < 0))
            which = int(np.searchsorted(ends, place, "right"))
            start = int(ends[which - 1]) if which else 0
            of = f" of text {which}" if len(texts) > 1 else ""
            raise self._unlisted(text[place], place - start, of)
        return tokens, ends

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into UTF-8."""
        tokens = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        codes = self._code_table
        if tokens.dtype.kind in "iu" and tokens.size and tokens.min() >= 0:
            found = codes[np.minimum(tokens, len(codes) - 1)]
            if found.max() < 0x110000:
                return found.tobytes().decode("utf-32-le").encode()
        return super().decode_bytes(tokens)

    # Tables: made on first use, no part of the value.

    def _code_ids(self) -> dict[int, int]:
        """The id of each code point that has one."""
        return {ord(character): token for character, token in self._ids.items()}

    @property
    def _by_code(self) -> dict[int, int]:
        table = vars(self).get("_by_code_cache")
        if table is None:
            table = vars(self)["_by_code_cache"] = self._code_ids()
        return table

    @property
    def _by_code_table(self) -> np.ndarray:
        """The same as an array of at least the ASCII range, whose last entry is for all beyond."""
        table = vars(self).get("_by_code_table_cache")
        if table is None:
            codes = np.array(list(self._by_code), np.int64)
            default = -1 if self.unknown_id is None else self.unknown_id
            table = np.full(max(128, int(codes.max(initial=0)) + 1) + 1, default, np.int32)
            table[codes] = list(self._by_code.values())
            vars(self)["_by_code_table_cache"] = table
        return table

    @property
    def _code_table(self) -> np.ndarray:
        """The code point of each id; beyond Unicode where there is none, and at the end."""
        table = vars(self).get("_code_table_cache")
        if table is None:
            table = [0x110000 if token is None else ord(token) for token in self.tokens]
            table = np.array([*table, 0x110000], np.uint32)
            vars(self)["_code_table_cache"] = table
        return table


class Words(Listed):
    """Text as the words between white space, as written: punctuation stays with its word.

    A token is a word, a word with the one space before it, or other white space; the tokens joined
    are the text. Where " word" is no token it is " " and "word", and where that is none either it
    is " " and the unknown token; white space that is no token is cut into its characters. So all
    that is ever lost are unlisted words and characters of white space that no text had in training,
    and each loss shows as the unknown token's name.
    """

    @classmethod
    def train(
        cls,
        texts: Texts,
        *,
        vocab_size: int | None = None,
        min_frequency: int = 1,
        special_tokens: Sequence[str] = (),
        unknown: str | None = "<unk>",
    ) -> "Words":
        """Lists the words of texts.

        Ids: the special tokens as given (then the unknown token, if it is not among them), a
        space and every other character of white space, then words and stretches of white space;
        each part the most frequent first and those of one frequency by code points.

        Args:
            texts: What to count.
            vocab_size: At most so many ids; no limit if None.
            min_frequency: Words that occur less often are left out.
            special_tokens: Names that are in no text.
            unknown: Stands for the words that are left out.

        Raises:
            ValueError: If a word would be left out and there is no unknown token, or `vocab_size`
                does not hold the special tokens and the white space.
        """
        counts: collections.Counter[str] = collections.Counter()
        for text in documents(texts):
            counts.update(WORDS.split(text))
        spaces = collections.Counter({" ": 1})
        for word, count in counts.items():
            for character in word if is_space(word) else word[: word.startswith(" ")]:
                spaces[character] += count
        return cls(
            **listed.most_frequent(
                counts,
                listed.by_frequency(spaces),
                vocab_size,
                min_frequency,
                special_tokens,
                unknown,
            )
        )

    def _encode(self, text: str) -> list[int]:
        words, ids = WORDS.split(text), self._ids
        try:
            return [ids[word] for word in words]
        except KeyError:
            pass
        tokens, position = [], 0
        for word in words:
            if (token := ids.get(word)) is not None:
                tokens.append(token)
            else:
                tokens.extend(self._unlisted_word(word, position))
            position += len(word)
        return tokens

    def _unlisted_word(self, word: str, position: int) -> list[int]:
        if is_space(word):
            parts = list(word)
        else:
            parts = [" ", word[1:]] if word.startswith(" ") else [word]
        tokens = []
        for part in parts:
            token = self._ids.get(part, self.unknown_id)
            if token is None:
                raise self._unlisted(part, position)
            tokens.append(token)
            position += len(part)
        return tokens


def is_space(word: str) -> bool:
    """Whether a piece that `WORDS` cut is white space: then it ends in it."""
    return bool(unicode.is_space()[ord(word[-1])])
