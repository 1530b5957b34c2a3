"""SentencePiece's byte-pair encoding, as Llama and its relatives use it."""

import dataclasses
import enum
import heapq
import itertools
import math
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxformer.tokenizers import tokenizer

MARK = "▁"
"""What a space becomes: the lower one eighth block, U+2581."""


class Kind(enum.IntEnum):
    """What a piece is for; the numbers are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class Piece(NamedTuple):
    """A token, and how early the merges that make it are done: the highest score first."""

    text: str
    score: float
    kind: Kind


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SentencePieceBpe(tokenizer.Tokenizer):
    """Merges characters to pieces, the piece of the highest score first and then the leftmost.

    Spaces become `▁`, and any two neighbours merge whose concatenation is a piece, over the
    borders of words too if there are such pieces. User-defined pieces are cut out beforehand, the
    longest first. A character without a piece becomes the pieces of its UTF-8 bytes, or else each
    run of such characters becomes the one unknown token. Control pieces are special tokens, which
    no text becomes unless the call names them; so is the unknown one.

    Decoding takes `▁` for a space and drops the first one of a sequence where encoding adds it.
    Text with a `▁` of its own, or with spaces that `remove_extra_whitespaces` removes, does
    therefore not come back as it was. Special tokens decode to their names; what stands between
    two of them is encoded as a text of its own, with its own space in front.

    Attributes:
        pieces: The vocabulary: text, score and kind of each id.
        byte_fallback: Whether unknown characters become bytes; needs all 256 byte pieces.
        add_dummy_prefix: Whether a text gets a space in front, so that its first word looks like
            any other.
        remove_extra_whitespaces: Whether spaces at the ends are dropped and others made single.
        bos: Id of the token that begins a sequence, if any; encoding does not add it.
        eos: Id of the token that ends a sequence, if any; encoding does not add it.

    Raises:
        ValueError: If a piece is empty or there twice, a score is not finite, there is not exactly
            one unknown piece, a byte is missing, or `bos` or `eos` is no control piece.

    References:
        Kudo and Richardson 2018, "SentencePiece". https://arxiv.org/abs/1808.06226
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """

    pieces: tuple[Piece, ...]
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    bos: int | None = None
    eos: int | None = None

    def __post_init__(self) -> None:
        specials = self._of_kind(Kind.CONTROL, Kind.UNKNOWN)
        if self.special_tokens and dict(self.special_tokens) != specials:
            raise ValueError("The special tokens of a SentencePiece model are its control pieces.")
        object.__setattr__(self, "special_tokens", MappingProxyType(specials))
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        seen: dict[str, int] = {}
        for i, (text, score, _) in enumerate(self.pieces):
            if not text:
                raise ValueError(f"Piece {i} is empty.")
            if seen.setdefault(text, i) != i:
                raise ValueError(f"The piece {text!r} has two ids: {seen[text]} and {i}.")
            if not math.isfinite(score):
                raise ValueError(f"The score of piece {i}, {text!r}, is {score}.")
        if len(unknown := self._of_kind(Kind.UNKNOWN)) != 1:
            raise ValueError(f"A model has one unknown piece; this has {len(unknown)}.")
        bytes_there = self._bytes()
        if self.byte_fallback and len(bytes_there) < 256:
            missing = min(set(range(256)) - set(bytes_there))
            raise ValueError(f"Byte fallback needs all bytes; there is no <0x{missing:02X}>.")
        for name, token in (("bos", self.bos), ("eos", self.eos)):
            if token is not None and token not in self.special_tokens.values():
                raise ValueError(f"{name}={token} is no control piece.")
        for text in self._of_kind(Kind.USER_DEFINED) if self.remove_extra_whitespaces else ():
            if "  " in text:
                raise ValueError(
                    f"The user-defined piece {text!r} holds several spaces, which "
                    "remove_extra_whitespaces would remove."
                )

    def _of_kind(self, *kinds: Kind) -> dict[str, int]:
        return {piece.text: i for i, piece in enumerate(self.pieces) if piece.kind in kinds}

    def _bytes(self) -> dict[int, int]:
        """The id of each byte that has a piece."""
        ids = {}
        for text, i in self._of_kind(Kind.BYTE).items():
            if not re.fullmatch("<0x[0-9A-F]{2}>", text):
                raise ValueError(f"Piece {i}, {text!r}, is no byte: these are <0x00> to <0xFF>.")
            ids[int(text[3:5], 16)] = i
        return ids

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def unknown_id(self) -> int:
        """The id of characters that have no piece, unless they become bytes."""
        return next(i for i, piece in enumerate(self.pieces) if piece.kind == Kind.UNKNOWN)

    # Encoding.

    def normalize(self, text: str) -> str:
        """The text that is cut into pieces: spaces made visible, added and removed."""
        if self.remove_extra_whitespaces:
            text = re.sub("  +", " ", text.strip(" "))
        if not text:
            return ""
        text = (MARK if self.add_dummy_prefix else "") + text.replace(" ", MARK)
        return text.rstrip(MARK) if self.remove_extra_whitespaces else text

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes UTF-8; with byte fallback, bytes that are no UTF-8 become byte pieces.

        Raises:
            ValueError: If `data` is no UTF-8 and there is no byte fallback.
        """
        if not self.byte_fallback:
            return super().encode_bytes(data)
        # Each stray byte becomes a lone surrogate, which is a character without a piece.
        return self._encode(data.decode("utf-8", "surrogateescape"))

    def _encode(self, text: str) -> list[int]:
        rules = self._rules
        tokens: list[int] = []
        for part, user_defined in rules.parts(self.normalize(text)):
            if user_defined is not None:
                tokens.append(user_defined)
                continue
            for word in rules.words(part):
                known = rules.cache.get(word)
                tokens += rules.encode_word(word) if known is None else known
        if not self.byte_fallback and (unknown := self.unknown_id) in tokens:
            pairs = zip([None, *tokens], tokens)
            tokens = [b for a, b in pairs if not a == b == unknown]
        return tokens

    @property
    def _rules(self) -> "_Rules":
        rules = vars(self).get("_rules_cache")
        if rules is None:
            rules = vars(self)["_rules_cache"] = _Rules(self)
        return rules

    # Decoding.

    def decode_bytes(self, ids: tokenizer.Ids) -> bytes:
        """Turns ids into bytes.

        Raises:
            ValueError: If an id is none of this tokenizer's; it names the id and the vocabulary
                size.
        """
        tokens = tokenizer.listed_ids(ids)
        if not tokens:
            return b""
        first = self.token_bytes(tokens[0], first=True)
        try:
            return first + b"".join(map(self._rules.spelled.__getitem__, tokens[1:]))
        except KeyError as error:
            raise self._no_such(error.args[0]) from None

    def _piece(self, token: int, first: bool) -> bytes:
        text, _, kind = self.pieces[token]
        if kind == Kind.BYTE:
            return bytes([int(text[3:5], 16)])
        if first and (self.add_dummy_prefix or self.remove_extra_whitespaces):
            text = text.removeprefix(MARK)
        return text.replace(MARK, " ").encode()

    # Files.

    def to_json(self) -> dict[str, Any]:
        """Our own layout, which holds everything; `formats.save` writes the others."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pieces = [[text, score, int(kind)] for text, score, kind in self.pieces]
        del value["special_tokens"]
        return {"jaxformer": "sentencepiece"} | value | {"pieces": pieces}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SentencePieceBpe":
        """Reads what `to_json` gives.

        Raises:
            ValueError: If a field is missing or wrong.
        """
        fields: dict[str, Any] = {key: entry for key, entry in value.items() if key != "jaxformer"}
        try:
            rows = [(str(text), float(score), Kind(kind)) for text, score, kind in fields["pieces"]]
            fields["pieces"] = tuple(Piece(*row) for row in rows)
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The fields are not those of a SentencePiece model: {error}."
            ) from None


class _Rules:
    """What encoding looks up, made from a tokenizer on first use, and a cache of words."""

    CACHED_WORDS = 1 << 16
    CACHED_LENGTH = 64  # characters

    def __init__(self, model: SentencePieceBpe) -> None:
        self.ids = model._of_kind(Kind.NORMAL)
        # The heap gives the smallest first.
        self.ranks = {text: -model.pieces[i].score for text, i in self.ids.items()}
        self.bytes = model._bytes() if model.byte_fallback else {}
        self.unknown = model.unknown_id
        self.user_defined = model._of_kind(Kind.USER_DEFINED)
        longest_first = sorted(self.user_defined, key=len, reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # If no piece reaches from a word into the next, words can be encoded one by one.
        joined = re.compile(f"[^{MARK}]{MARK}")
        self.by_word = not any(joined.search(text) for text in self.ids)
        self.cache: dict[str, tuple[int, ...]] = {}
        self.spelled = {i: model.token_bytes(i) for i in range(len(model.pieces))}

    def parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cuts the user-defined pieces out: (text, None) or (text, id)."""
        if not self.user_defined:
            yield text, None
            return
        for i, part in enumerate(self.splitter.split(text)):
            if part:
                yield part, self.user_defined[part] if i % 2 else None

    def words(self, text: str) -> list[str]:
        """Cuts text before each run of marks, unless a piece has a mark behind something else."""
        if self.by_word:
            return re.findall(f"{MARK}*[^{MARK}]+|{MARK}+", text)
        return [text]

    def encode_word(self, word: str) -> tuple[int, ...]:
        """Encodes a word that was not in the cache."""
        tokens = tuple(self._tokens(_merge(word, self.ranks)))
        if len(word) <= self.CACHED_LENGTH:
            if len(self.cache) >= self.CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = tokens
        return tokens

    def _tokens(self, symbols: list[str]) -> Iterator[int]:
        for symbol in symbols:
            token = self.ids.get(symbol)
            if token is not None:
                yield token
            elif self.bytes:
                yield from map(self.bytes.__getitem__, symbol.encode("utf-8", "surrogateescape"))
            else:
                yield self.unknown


def _merge(text: str, ranks: dict[str, float]) -> list[str]:
    """Merges neighbours by rank, leftmost first, until no two make a piece: O(n log n)."""
    symbols = list(text)
    before = list(range(-1, len(text) - 1))
    after = [*range(1, len(text)), -1]
    pairs = zip(range(len(text)), map("".join, itertools.pairwise(text)))
    heap = [(ranks[pair], i, pair) for i, pair in pairs if pair in ranks]
    heapq.heapify(heap)
    while heap:
        _, left, merged = heapq.heappop(heap)
        right = after[left]
        # Symbols only grow, so that a pair is out of date exactly if its length is.
        if right < 0 or len(symbols[left]) + len(symbols[right]) != len(merged):
            continue
        symbols[left], symbols[right] = merged, ""
        after[left] = following = after[right]
        after[right] = -1
        if following >= 0:
            before[following] = left
            pair = merged + symbols[following]
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], left, pair))
        if (previous := before[left]) >= 0:
            pair = symbols[previous] + merged
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], previous, pair))
    return [symbol for symbol in symbols if symbol]
