"""The contract that every tokenizer keeps, and what all of them share."""

import abc
import codecs
import dataclasses
import itertools
import operator
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import numpy as np

codecs.lookup("utf-32-le")  # imported here: a fork during an import would hang the child

Kind = TypeVar("Kind", bound="Tokenizer")
Ids = Iterable[SupportsIndex]
"""Tokens as whatever an index may be: Python's integers, NumPy's, an array of them."""


Texts = Iterable[str | os.PathLike]
"""Documents, as strings or as paths of files of UTF-8."""


MAX_TOKENS = 1 << 21
"""Ids are smaller than this."""


class Span(NamedTuple):
    """A stretch of text and whether the names of special tokens in it are meant as such."""

    text: str
    trusted: bool = False


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tokenizer(abc.ABC):
    """An immutable value that turns text into integers and back.

    Two tokenizers are equal when their fields are: whatever they cache is neither compared, nor
    pickled, nor shared between threads in use. Text never becomes a special token unless the call
    names it.

    Attributes:
        special_tokens: Names of tokens with a meaning of their own, and their ids.
    """

    special_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", MappingProxyType(dict(self.special_tokens)))
        check_special(self.special_tokens)
        for name, token in self.special_tokens.items():
            if type(token) is not int or not 0 <= token < MAX_TOKENS:
                raise ValueError(
                    f"The special token {name!r} has the id {token!r}; ids are integers from 0 to "
                    f"{MAX_TOKENS - 1}."
                )

    # What a tokenizer has to provide.

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id, the special tokens' included."""

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for whatever has no token of its own, if there is one."""
        return None

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Describes the value completely, in the layout that `load` reads."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encodes text in which no special token is looked for."""

    @abc.abstractmethod
    def _piece(self, token: int, first: bool) -> bytes:
        """UTF-8 of an ordinary token, as the first of a sequence or later; KeyError if unknown."""

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts one after the other: int32 ids, and the position where each text ends."""
        parts = [self._encode(text) for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        flat = np.fromiter((token for part in parts for token in part), np.int32)
        return flat, ends

    def _boxed(self, ids: np.ndarray) -> np.ndarray:
        """The ids as an array of which `tolist` is quick: objects, where they are at hand."""
        return ids

    # Encoding.

    def encode(self, text: str, *, allow_special: Collection[str] = ()) -> list[int]:
        """Encodes text.

        Args:
            text: Any text without lone surrogates.
            allow_special: Names of special tokens that become their ids where they stand in the
                text, the longest first; all other names are plain text.

        Raises:
            ValueError: If a name is no special token, or the text holds a lone surrogate, or a
                character that this tokenizer has neither a token nor an unknown token for.
        """
        if not allow_special:
            return self._encode(checked(text))
        tokens: list[int] = []
        for part, special in self._parts(checked(text), allow_special):
            tokens.extend([special] if special is not None else self._encode(part))
        return tokens

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes plain text to an int32 array: for long texts faster than a list."""
        return self._encode_flat([checked(text)])[0]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes UTF-8; only a tokenizer of bytes takes what is none.

        Raises:
            ValueError: If the tokenizer is not one of bytes and `data` is no UTF-8.
        """
        return self._encode(utf8(data))

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: Collection[str] = ()
    ) -> list[list[int]]:
        """Encodes each text as `encode` does, many at once."""
        if allow_special:
            names = self._allowed(allow_special)
            return [self.encode(text, allow_special=names) for text in several(texts)]
        flat, ends = self._encode_flat([checked(text) for text in several(texts)])
        tokens = self._boxed(flat)
        return [tokens[i:j].tolist() for i, j in itertools.pairwise([0, *ends.tolist()])]

    def encode_padded(
        self, texts: Sequence[str], *, pad: int, length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts to one array, cut or filled on the right.

        Args:
            texts: B plain texts.
            pad: The integer that fills up; it need not be a token.
            length: Columns T; the longest text's tokens if None.

        Returns:
            Ids (B, T) as int32 and the lengths (B,) as int32, in tokens, after cutting.
        """
        flat, ends = self._encode_flat([checked(text) for text in several(texts)])
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(texts)]
        lengths = ends - starts
        if length is None:
            length = int(lengths.max(initial=0))
        elif length < 0:
            raise ValueError(f"encode_padded needs length >= 0, got {length}.")
        lengths = np.minimum(lengths, length)
        filled = np.arange(length)[None, :] < lengths[:, None]
        ids = np.full((len(texts), length), pad, np.int32)
        ids[filled] = flat[(starts[:, None] + np.arange(length)[None, :])[filled]]
        return ids, lengths.astype(np.int32)

    def encode_spans(self, spans: Iterable[tuple[Any, ...] | str]) -> list[int]:
        """Encodes a chat: special tokens are read in trusted spans only.

        Each span is encoded by itself, so that no token reaches from one into the next.

        Args:
            spans: `Span(text, trusted)`; a bare string is untrusted.

        Raises:
            ValueError: If a span is no text with True or False, or its text cannot be encoded.
        """
        if isinstance(spans, str):
            raise ValueError("encode_spans takes several spans, got one string.")
        tokens: list[int] = []
        for span in spans:
            text, trusted = (span, False) if isinstance(span, str) else span
            if not isinstance(text, str) or not isinstance(trusted, bool):
                raise ValueError(f"A span is a text and True or False, got {span!r:.80}.")
            tokens.extend(self.encode(text, allow_special=self.special_tokens if trusted else ()))
        return tokens

    # Decoding.

    def decode(self, ids: Ids, *, errors: str = "replace") -> str:
        """Turns ids into text, special tokens into their names.

        Args:
            ids: Tokens, as integers or an integer array.
            errors: What becomes of bytes that are no UTF-8, as for `bytes.decode`.

        Raises:
            ValueError: If an id is none of this tokenizer's; it names the id and the vocabulary
                size.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into bytes, without loss where the tokenizer is one of bytes."""
        tokens = listed_ids(ids)
        return b"".join([self.token_bytes(token, first=not i) for i, token in enumerate(tokens)])

    def decode_stream(self, ids: Ids, *, errors: str = "replace") -> Iterator[str]:
        """Yields the text of ids as they come, never half a character.

        Each id yields what it completes, which may be nothing; the pieces joined are `decode(ids)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for i, token in enumerate(ids):
            yield decoder.decode(self.token_bytes(token, first=not i))
        if rest := decoder.decode(b"", final=True):
            yield rest

    def token_bytes(self, token: SupportsIndex, *, first: bool = False) -> bytes:
        """The bytes that one id stands for, as the first of a sequence or later."""
        token = operator.index(token)
        if (name := self._special_names.get(token)) is not None:
            return name.encode()
        try:
            if token >= 0:
                return self._piece(token, first)
        except (KeyError, IndexError):
            pass
        raise self._no_such(token)

    def _no_such(self, token: object) -> ValueError:
        return ValueError(
            f"No token has the id {token}: the vocabulary has size {self.vocab_size}."
        )

    # Files.

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file, which is the old or the new one whole whenever it is read."""
        import json

        write_atomically(path, json.dumps(self.to_json(), ensure_ascii=False).encode())

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike) -> Kind:
        """Reads what `save` wrote, and every other format that `formats.load` knows.

        Raises:
            ValueError: If the file is malformed, or holds another kind of tokenizer.
        """
        from jaxformer.tokenizers import formats

        tokenizer = formats.load(path)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} holds a {type(tokenizer).__name__}, not a {cls.__name__}.")
        return tokenizer

    # Values.

    def __getstate__(self) -> dict[str, Any]:
        fields = [field.name for field in dataclasses.fields(self) if field.init]
        state = {name: getattr(self, name) for name in fields}
        return {**state, "special_tokens": dict(self.special_tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _key(self) -> tuple:
        state = self.__getstate__()
        state["special_tokens"] = frozenset(self.special_tokens.items())
        return tuple(
            x.astype(np.int64).tobytes() if isinstance(x, np.ndarray) else x for x in state.values()
        )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or self._key() == other._key()  # pyright: ignore

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        specials = len(self.special_tokens)
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, {specials} special tokens)"

    # Special tokens.

    @property
    def _special_names(self) -> dict[int, str]:
        names = vars(self).get("_special_names_cache")
        if names is None:
            names = {token: name for name, token in self.special_tokens.items()}
            vars(self)["_special_names_cache"] = names
        return names

    def _parts(self, text: str, allowed: Collection[str]) -> Iterator[tuple[str, int | None]]:
        """Cuts text at the allowed special tokens: (text, None) or (name, id)."""
        names = "|".join(map(re.escape, self._allowed(allowed)))
        for i, part in enumerate(re.split(f"({names})", text)):
            if i % 2:
                yield part, self.special_tokens[part]
            elif part:
                yield part, None

    def _allowed(self, names: Collection[str]) -> list[str]:
        """The names of special tokens, checked, the longest first."""
        if isinstance(names, str):
            raise ValueError(f"allow_special takes a collection of names, got {names!r}.")
        names = sorted(names, key=len, reverse=True)
        for name in names:
            if name not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise ValueError(f"{name!r} is no special token; there are: {known}.")
        return names


def check_special(names: Iterable[str]) -> None:
    """Refuses names of special tokens that cannot be: empty, repeated, no text."""
    if isinstance(names, str):
        raise ValueError(f"Special tokens are a collection of names, got {names!r}.")
    seen: set[str] = set()
    for name in names:
        if not name:
            raise ValueError("A special token has an empty name.")
        if name in seen:
            raise ValueError(f"Special tokens repeat: {name!r}.")
        seen.add(checked(name))


def several(texts: Sequence[str]) -> Sequence[str]:
    """Refuses one string where several are meant."""
    if isinstance(texts, str):
        raise ValueError("A batch is several texts, got one string.")
    return texts


def listed_ids(ids: Ids) -> list[int]:
    """Ids as a list of Python's integers, whatever array they come in.

    Raises:
        ValueError: If they are no row of integers.
    """
    if hasattr(ids, "__array__"):
        return one_dimensional(np.asarray(ids)).tolist()
    ids = list(ids)
    try:
        return list(map(operator.index, ids))
    except TypeError:
        bad = next(token for token in ids if not hasattr(token, "__index__"))
        raise ValueError(f"Ids are integers, got {bad!r:.80}.") from None


def one_dimensional(ids: np.ndarray) -> np.ndarray:
    """Refuses arrays that are no row of integers."""
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iuO"):
        raise ValueError(f"Ids are a row of integers, got {ids.dtype} of shape {ids.shape}.")
    return ids


def documents(texts: Texts) -> Iterator[str]:
    """What to train on: strings as they are, paths as the text of their files, each a document.

    Raises:
        ValueError: If it is one string instead of several, a string holds a lone surrogate, or a
            file is no UTF-8, with its name and the line.
    """
    if isinstance(texts, str | os.PathLike):
        raise ValueError(f"train takes several texts, got one {type(texts).__name__}.")
    for text in texts:
        if isinstance(text, str):
            yield checked(text)
        else:
            yield utf8(pathlib.Path(text).read_bytes(), os.fspath(text))


def checked(text: str) -> str:
    """Refuses lone surrogates, which no UTF-8 can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds a lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}; it is no Unicode text."
            ) from None
    return text


def utf8(data: bytes, name: str = "The input") -> str:
    """Decodes UTF-8, or raises a ValueError that says where it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is no UTF-8: line {line}, byte {error.start}: {error.reason}."
        ) from None


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file so that whoever opens the path finds the old bytes or all of the new.

    A link stays and what it names is replaced; what is no file, such as a pipe, is written to.
    """
    path = pathlib.Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
