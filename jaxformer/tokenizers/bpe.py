"""Byte-level byte pair encoding: lossless on any text and on any bytes.

A `Pattern` cuts text into words; each word's bytes are merged pair by pair in order of priority.
Words seen before are looked up, all of a document at once, in a table that grows to a bound and is
no part of the value.
"""

import dataclasses
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxformer.tokenizers import merging, patterns, pretokens, wordtable
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.ragged import grown, ragged
from jaxformer.tokenizers.tokenizer import Ids, Tokenizer

_SHORT = 256  # characters up to which a dictionary of words beats arrays
_BLOCK = 1 << 21  # characters that are cut into words at once
_SHORT_WORDS = 1 << 16  # bound of that dictionary
_WORDS, _POOL = 1 << 19, 1 << 23  # bounds of a table: words, and ids of all words
_LONG = 256  # bytes from which a word is merged by itself

# White space after a letter or a digit starts a word in every known pattern: text may be cut there.
_SAFE = re.compile("[0-9A-Za-zà-öа-яא-תぁ-んァ-ヺ一-鿿가-힣][ \n]")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Bpe(Tokenizer):
    """A vocabulary of byte strings and the merges that build them.

    Attributes:
        tokens: The bytes of each id; None where an id is a special token's or unused.
        merges: Left and right id of each merge, (M, 2), in order of priority; the result is the
            token of the bytes joined. Several merges may give the same token.
        pattern: How text is cut into words.
        whole_words: Whether a word that is a token becomes that token, whatever the merges say.

    Raises:
        ValueError: If tokens repeat, a merge names or gives no token, or a special token has the id
            of another.

    References:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
        https://arxiv.org/abs/1508.07909
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2:
        bytes as the alphabet.
    """

    tokens: tuple[bytes | None, ...]
    merges: np.ndarray
    pattern: Pattern = patterns.GPT2
    whole_words: bool = False
    _ids: dict[bytes, int] = dataclasses.field(init=False)
    _results: np.ndarray = dataclasses.field(init=False)
    _idle: "list[_IdTable]" = dataclasses.field(init=False)  # those that no thread is using
    _known: dict[str, list[int]] = dataclasses.field(init=False)  # words of short texts

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = {token: i for i, token in enumerate(self.tokens) if token is not None}
        _check_tokens(self.tokens, ids, self.special_tokens)
        merges = np.array(self.merges, np.int32).reshape(-1, 2)
        merges.setflags(write=False)
        results = _results(self.tokens, ids, merges)
        vars(self).update(merges=merges, _ids=ids, _results=results, _idle=[], _known={})

    @property
    def vocab_size(self) -> int:
        return max(len(self.tokens), 1 + max(self.special_tokens.values(), default=-1))

    def truncate(self, size: int) -> "Bpe":
        """The tokenizer that training with a smaller vocabulary would have given: merges nest.

        Raises:
            ValueError: If the size is larger than the vocabulary, or leaves out a single byte or a
                special token.
        """
        if not 0 < size <= self.vocab_size:
            raise ValueError(f"truncate takes 1 to {self.vocab_size} tokens, got {size}.")
        for name, token in self.special_tokens.items():
            if token >= size:
                raise ValueError(f"The special token {name!r} has the id {token} >= {size}.")
        for token in self.tokens[size:]:
            if token is not None and len(token) == 1:
                raise ValueError(f"A vocabulary of {size} leaves out the byte {token!r}.")
        kept = self.merges[self._results < size]
        return dataclasses.replace(self, tokens=self.tokens[:size], merges=kept)

    def to_json(self) -> dict[str, Any]:
        from jaxformer.tokenizers import hf_json

        return hf_json.bpe_to_json(self)

    # Encoding.

    def _encode(self, text: str) -> list[int]:
        if len(text) > _SHORT:
            return self._listed(self._encode_flat([text])[0])
        words = self._words(text)
        try:
            return list(itertools.chain.from_iterable(map(self._known.__getitem__, words)))
        except KeyError:
            found = self._learn(dict.fromkeys(words))
            return list(itertools.chain.from_iterable(map(found.__getitem__, words)))

    def _words(self, text: str) -> list[str]:
        if self._engine.starts is None:
            return self.pattern.split(text)
        return self.pattern.compiled(text.isascii()).findall(text)

    def _learn(self, words: Iterable[str]) -> dict[str, list[int]]:
        """Encodes distinct words and keeps their ids for short texts."""
        words = list(words)
        flat, ends = self._encode_words([word.encode() for word in words])
        ids, bounds = flat.tolist(), [0, *ends.tolist()]
        found = {word: ids[i:j] for word, (i, j) in zip(words, itertools.pairwise(bounds))}
        if len(self._known) + len(found) > _SHORT_WORDS:
            self._known.clear()
        self._known.update(found)
        return found

    def _listed(self, ids: np.ndarray) -> list[int]:
        return self._engine.integers[ids].tolist()

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes any bytes; those that are no UTF-8 count as characters that are no letters."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("utf-8", "surrogateescape")
            return self._encode_flat([text])[0].tolist()
        return self._encode(text)

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        starts = self._engine.starts
        if starts is None:
            return self._encode_by_regex(texts)
        blocks, ends, offset = [], [], 0
        for block, whole in _blocks(texts):
            flat, block_ends = self._encode_block(block, starts)
            blocks.append(flat)
            ends.append((block_ends + offset)[whole])
            offset += flat.size
        if not blocks:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        flat = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return flat, np.concatenate(ends)

    def _encode_block(
        self, texts: list[str], starts: pretokens.Starts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts with array arithmetic: ids, and where each text ends."""
        filled = [text for text in texts if text]
        if not filled:
            return np.zeros(0, np.int32), np.zeros(len(texts), np.int64)
        data, first, lengths, breaks = cut(filled, starts)
        flat, ends = self._look_up(data, first, lengths)
        ends = np.append(0, ends)[np.append(breaks, first.size)]
        if len(filled) == len(texts):
            return flat, ends
        which = np.cumsum([bool(text) for text in texts])
        return flat, np.append(0, ends)[which]

    def _encode_by_regex(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        words = [self.pattern.split(text) for text in texts]
        data = [word.encode("utf-8", "surrogateescape") for text in words for word in text]
        flat, ends = self._encode_words(data)
        return flat, np.append(0, ends)[np.cumsum([len(text) for text in words], dtype=np.int64)]

    def _encode_words(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        return self._look_up(b"".join(words), np.cumsum(lengths) - lengths, lengths)

    def _look_up(
        self, data: bytes, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words, one after the other, and where each word's end.

        A table is taken from the idle ones and given back: threads never share one, a fork finds
        none half changed, and an interrupt loses the one in use.
        """
        try:
            table = self._idle.pop()
        except IndexError:
            table = _IdTable(self._engine)
        result = table.ids(data, starts, lengths)
        if not table.is_full:
            self._idle.append(table)
        return result

    @property
    def _engine(self) -> "_Engine":
        engine = vars(self).get("_engine_cache")
        if engine is None:
            engine = vars(self)["_engine_cache"] = _Engine(self)
        return engine

    # Decoding.

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into bytes, without loss.

        Raises:
            ValueError: If an id is none of this tokenizer's; it names the id and the vocabulary
                size.
        """
        if not isinstance(ids, np.ndarray):
            ids = ids if isinstance(ids, list | tuple) else list(ids)
            if len(ids) <= _SHORT:
                return self._join(ids)
            try:
                ids = np.frombuffer(array("q", ids), np.int64)  # pyright: ignore
            except (TypeError, OverflowError):
                return self._join(ids)
        if not ids.size:
            return b""
        blob, first, lengths = self._engine.spelling
        if int(ids.min()) < 0 or int(ids.max()) >= lengths.size:
            return self._join(ids.tolist())
        first, lengths = first[ids], lengths[ids]
        if int(lengths.min()) < 0:
            return self._join(ids.tolist())
        # Each byte lies one after the last, but for the jumps from token to token.
        ends = np.cumsum(lengths)
        place = np.ones(int(ends[-1]), np.int64)
        place[0] = first[0]
        place[ends[:-1]] = first[1:] - first[:-1] - lengths[:-1] + 1
        np.cumsum(place, out=place)
        return blob.take(place, mode="wrap").tobytes()  # all are inside: the quickest mode

    def _join(self, ids: Sequence[SupportsIndex]) -> bytes:
        try:
            return b"".join(map(self._engine.bytes_of.__getitem__, ids))  # pyright: ignore
        except KeyError as error:
            raise self._no_such(error.args[0]) from None

    def _piece(self, token: int, first: bool) -> bytes:
        return self._engine.bytes_of[token]


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 0,
    special_tokens: Sequence[str] = (),
    pattern: Pattern = patterns.GPT2,
    progress=None,
) -> Bpe:
    from jaxformer.tokenizers import bpe_training

    return bpe_training.train(
        texts,
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        pattern=pattern,
        progress=progress,
    )


class _Engine:
    """What encoding needs of a tokenizer; made once and never changed."""

    def __init__(self, tokenizer: Bpe) -> None:
        self.starts = tokenizer.pattern.starts
        self.merges = merging.Merges(tokenizer.merges, tokenizer._results)
        self.whole = tokenizer._ids if tokenizer.whole_words else {}
        ids = tokenizer._ids
        self.byte_ids = np.array([ids.get(bytes([i]), -1) for i in range(256)], np.int32)
        self.bytes_of = {i: token for i, token in enumerate(tokenizer.tokens) if token is not None}
        self.bytes_of |= {i: name.encode() for name, i in tokenizer.special_tokens.items()}
        self._size = tokenizer.vocab_size
        self.integers = np.arange(self._size).astype(object)  # shared by all lists: none is made

    def merge(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Merges distinct words: their symbols, word after word, and the number for each."""
        long = lengths > _LONG
        if not long.any():
            return self.merges.merge_words(symbols, lengths)
        counts = np.empty(lengths.size, np.int64)
        of_long = np.repeat(long, lengths)
        parts = []
        for which, merge, part in (
            (~long, self.merges.merge_words, symbols[~of_long]),
            (long, self.merges.merge_long, symbols[of_long]),
        ):
            merged, counts[which] = merge(part, lengths[which])
            parts.append(merged)
        merged = np.empty(int(counts.sum()), np.int32)
        of_long = np.repeat(long, counts)
        merged[~of_long], merged[of_long] = parts
        return merged, counts

    @property
    def spelling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens' bytes in a row, each id's first byte and number of bytes: -1 where unused."""
        made = vars(self).get("_spelling")
        if made is None:
            tokens = [self.bytes_of.get(i) for i in range(self._size)]
            lengths = np.array([-1 if token is None else len(token) for token in tokens], np.int64)
            filled = np.maximum(lengths, 0)
            blob = np.frombuffer(b"".join(filter(None, tokens)), np.uint8)
            made = vars(self)["_spelling"] = (blob, np.cumsum(filled) - filled, lengths)
        return made


class _IdTable:
    """The ids of every word seen; for one thread at a time."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._table = wordtable.WordTable()
        self._pool = np.zeros(1 << 14, np.int32)
        self._used = 0
        self._place = np.zeros(1 << 14, np.int64)  # a word's first id in the pool << 32 | how many
        self._placed = 0

    @property
    def is_full(self) -> bool:
        return self._table.size > _WORDS or self._used > _POOL

    def ids(
        self, data: bytes, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words, one after the other, and where each word's end."""
        words = self._table.number(data, starts, lengths)
        if self._table.size > self._placed:
            self._add_new()
        place = self._place[words]
        count = place & 0xFFFFFFFF
        ends = np.cumsum(count)
        index = np.repeat((place >> 32) - (ends - count), count)
        index += np.arange(index.size)
        return self._pool[index], ends

    def _add_new(self) -> None:
        """Merges the words that have no ids yet: the long ones one by one, the others at once."""
        table, first = self._table, self._placed
        octets, lengths = table.spelling(first)
        symbols = self._engine.byte_ids[octets]
        if symbols.size and int(symbols.min()) < 0:
            byte = int(octets[symbols < 0][0])
            raise ValueError(f"The vocabulary has no token for the byte 0x{byte:02X}.")
        starts = np.cumsum(lengths) - lengths
        merged, counts = self._engine.merge(symbols, lengths)
        if self._engine.whole:
            merged, counts = self._whole_words(octets, starts, lengths, merged, counts)
        self._store(merged, counts)

    def _whole_words(
        self,
        octets: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        merged: np.ndarray,
        counts: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Words that are tokens become them, whatever the merges gave."""
        data, whole = octets.tobytes(), self._engine.whole
        found = np.array(
            [whole.get(data[i : i + n], -1) for i, n in zip(starts.tolist(), lengths.tolist())],
            np.int32,
        )
        hit = found >= 0
        first = np.cumsum(counts) - counts
        keep = np.ones(merged.size, bool)
        keep[ragged(first[hit] + 1, counts[hit] - 1)] = False
        merged[first[hit]] = found[hit]
        return merged[keep], np.where(hit, 1, counts)

    def _store(self, ids: np.ndarray, counts: np.ndarray) -> None:
        used, size = self._used + ids.size, self._placed + counts.size
        self._pool = grown(self._pool, self._used, used)
        self._pool[self._used : used] = ids
        self._place = grown(self._place, self._placed, size)
        offsets = self._used + np.cumsum(counts) - counts
        self._place[self._placed : size] = (offsets << 32) | counts
        self._used, self._placed = used, size


def cut(
    texts: Sequence[str], starts: pretokens.Starts
) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts non-empty texts into words.

    Bytes that are no UTF-8 stand in the texts as the surrogates of `surrogateescape`.

    Returns:
        The bytes of all texts, the first byte and the number of bytes of each word, and for each
        text but the first the number of words before it.
    """
    joined = texts[0] if len(texts) == 1 else "\n".join(texts)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    gaps = np.cumsum(sizes[:-1]) + np.arange(sizes.size - 1)
    if joined.isascii():
        data = bytearray(joined, "ascii")
        np.frombuffer(data, np.uint8)[gaps] = pretokens.BREAK_BYTE
        data = bytes(data)
        bounds = np.flatnonzero(starts(data))
    else:
        codes = np.frombuffer(bytearray(joined.encode("utf-32-le", "surrogatepass")), "<u4")
        codes[gaps] = pretokens.BREAK_CODE
        data = joined.encode("utf-8", "surrogateescape")
        position = _byte_positions(data, codes)
        bounds, gaps = position[np.flatnonzero(starts(codes))], position[gaps]
    first = bounds[:-1]
    lengths = bounds[1:] - first
    if not gaps.size:
        return data, first, lengths, gaps
    is_word = np.ones(first.size, bool)
    breaks = np.searchsorted(first, gaps)
    is_word[breaks] = False
    return data, first[is_word], lengths[is_word], breaks - np.arange(breaks.size)


def _byte_positions(data: bytes, codes: np.ndarray) -> np.ndarray:
    """The first byte of each character, and the end."""
    octets = np.frombuffer(data, np.int8)
    lead = np.flatnonzero(octets >= -64)  # every byte but those that continue a character
    if lead.size != codes.size:  # some bytes are no UTF-8
        width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        width[(codes >= 0xDC80) & (codes <= pretokens.BREAK_CODE)] = 1
        return np.append(0, np.cumsum(width))
    return np.append(lead, octets.size)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Groups texts into blocks of bounded size, cutting long ones where a word surely starts.

    Yields:
        The parts of a block, and the indices of those that end a text.
    """
    block: list[str] = []
    whole: list[int] = []
    size = 0
    for text in texts:
        start = 0
        while True:
            end = len(text)
            if end - start > _BLOCK and (match := _SAFE.search(text, start + _BLOCK)):
                end = match.start() + 1
            block.append(text if end - start == len(text) else text[start:end])
            size += end - start
            start = end
            if end == len(text):
                whole.append(len(block) - 1)
            if size >= _BLOCK:
                yield block, np.array(whole, np.int64)
                block, whole, size = [], [], 0
            if end == len(text):
                break
    if block:
        yield block, np.array(whole, np.int64)


def _check_tokens(tokens: tuple[bytes | None, ...], ids: dict[bytes, int], special: Any) -> None:
    if len(ids) != sum(token is not None for token in tokens) or b"" in ids:
        seen: dict[bytes, int] = {}
        for i, token in enumerate(tokens):
            if token == b"":
                raise ValueError(f"The token {i} is empty.")
            if token is not None and seen.setdefault(token, i) != i:
                raise ValueError(f"The tokens {seen[token]} and {i} are both {token!r}.")
    taken: dict[int, str] = {}
    for name, i in special.items():
        if i < 0 or (i < len(tokens) and tokens[i] is not None) or i in taken:
            raise ValueError(f"The special token {name!r} has the id {i}, which is not free.")
        taken[i] = name


def _results(
    tokens: tuple[bytes | None, ...], ids: dict[bytes, int], merges: np.ndarray
) -> np.ndarray:
    """The id that each merge gives."""
    if merges.size and not 0 <= int(merges.min()) <= int(merges.max()) < len(tokens):
        raise ValueError(f"Merges name ids outside 0 to {len(tokens) - 1}.")
    try:
        results = [ids[tokens[left] + tokens[right]] for left, right in merges.tolist()]  # pyright: ignore
    except (KeyError, TypeError):
        for i, (left, right) in enumerate(merges.tolist()):
            a, b = tokens[left], tokens[right]
            if a is None or b is None or a + b not in ids:
                raise ValueError(f"Merge {i}, {a!r} with {b!r}, gives no token.") from None
        raise
    return np.array(results, np.int32)
