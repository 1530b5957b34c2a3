"""Byte-level byte pair encoding: lossless on any text and on any bytes.

A `Pattern` cuts text into words; each word's bytes are merged pair by pair in order of priority.
Words seen before are looked up, all of a document at once, in a table that grows to a bound and is
no part of the value.
"""

import dataclasses
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxformer.tokenizers import (
    bpe_training,
    byte_alphabet,
    cutting,
    merging,
    patterns,
    word_ids,
)
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.ragged import distinct, ragged
from jaxformer.tokenizers.tokenizer import (
    Ids,
    Texts,
    Tokenizer,
    check_special,
    listed_ids,
    one_dimensional,
)

_SHORT = 256  # characters up to which a dictionary of words beats arrays
_BLOCK = 1 << 17  # characters that are cut into words at once: what fits a cache
_BLOCKS = 16  # of which the new words are merged at once
_SHORT_WORDS = 1 << 16  # bound of that dictionary
_IDS = 1 << 14  # decoded at once
_LONG = 256  # bytes from which a word is merged by itself


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
    _known: dict[str, list[int]] = dataclasses.field(init=False)  # words of short texts

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = tuple(self.tokens)
        ids = {token: i for i, token in enumerate(tokens) if token is not None}
        _check_tokens(tokens, ids, self.special_tokens)
        merges = np.asarray(self.merges)
        if merges.size and merges.dtype.kind not in "iu":
            raise ValueError(f"Merges are pairs of integers, got {merges.dtype}.")
        merges = merges.astype(np.int32).reshape(-1, 2)
        merges.setflags(write=False)
        results = _results(tokens, ids, merges)
        vars(self).update(tokens=tokens, merges=merges, _ids=ids, _results=results, _known={})

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
                raise ValueError(
                    f"The special token {name!r} has the id {token} >= {size}; leave it out first: "
                    "dataclasses.replace(tokenizer, special_tokens={})."
                )
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
            return self._boxed(self._encode_flat([text])[0]).tolist()
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
        ((flat, ends),) = self._engine.words.look_up([_joined([w.encode() for w in words])])
        ids, bounds = flat.tolist(), [0, *ends.tolist()]
        found = {word: ids[i:j] for word, (i, j) in zip(words, itertools.pairwise(bounds))}
        if len(self._known) + len(found) > _SHORT_WORDS:
            self._known.clear()
        self._known.update(found)
        return found

    def _boxed(self, ids: np.ndarray) -> np.ndarray:
        return self._engine.integers[ids]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes any bytes; those that are no UTF-8 count as characters that are no letters."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("utf-8", "surrogateescape")
            return self._encode_flat([text])[0].tolist()
        return self._encode(text)

    def _encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        flats, ends, offset = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0
        for group in self._groups(texts):
            found = self._engine.words.look_up([words for words, _ in group])
            for (flat, word_ends), (_, text_ends) in zip(found, group):
                flats.append(flat)
                ends.append(np.append(0, word_ends)[text_ends] + offset)
                offset += flat.size
        return np.concatenate(flats), np.concatenate(ends)

    def _groups(self, texts: Sequence[str]) -> Iterator[list[tuple[word_ids.Words, np.ndarray]]]:
        """Cuts texts into words: blocks of them, and the words up to the end of each text."""
        starts = self._engine.starts
        if starts is None:
            words = [self.pattern.split(text) for text in texts]
            data = [word.encode("utf-8", "surrogateescape") for text in words for word in text]
            ends = np.cumsum([len(text) for text in words], dtype=np.int64)
            yield [(_joined(data), ends)]
            return
        blocks = cutting.blocks(texts, _BLOCK, cutting.SAFE)
        while group := list(itertools.islice(blocks, _BLOCKS)):
            cuts = [(cutting.cut(block, starts), whole) for block, whole in group]
            yield [(words[:3], words[3][whole]) for words, whole in cuts]

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
        if hasattr(ids, "__array__"):
            ids = np.asarray(ids)
            if not ids.size:
                return b""
            one_dimensional(ids)
            if ids.dtype == object:
                return self._join(listed_ids(ids))
        else:
            ids = ids if isinstance(ids, list | tuple) else list(ids)
            if len(ids) <= _SHORT:
                return self._join(ids)
        return b"".join(
            [self._spelled(ids[i : i + _IDS]) for i in range(0, len(ids), _IDS)]  # fits a cache
        )

    def _spelled(self, ids: Sequence[SupportsIndex] | np.ndarray) -> bytes:
        """The bytes of ids, gathered from those of all tokens."""
        if isinstance(ids, np.ndarray):
            row = ids.astype(np.int64, copy=False)
        else:
            try:
                row = np.frombuffer(array("q", ids), np.int64)  # pyright: ignore
            except (TypeError, OverflowError):
                return self._join(listed_ids(ids))
        blob, first, last = self._engine.spelling
        if int(row.view(np.uint64).max()) >= first.size:  # negative ones too
            return self._join(ids.tolist() if isinstance(ids, np.ndarray) else ids)
        first, last = first[row], last[row]
        lengths = last - first
        lengths += 1
        ends = np.cumsum(lengths)
        # Each byte lies one after the last, but for the jumps from token to token.
        place = np.ones(int(ends[-1]), np.int64)
        place[0] = first[0]
        place[ends[:-1]] = first[1:] - last[:-1]
        np.cumsum(place, out=place)
        return blob.take(place, mode="wrap").tobytes()  # all are inside: the quickest mode

    def _join(self, ids: Sequence[SupportsIndex]) -> bytes:
        try:
            return b"".join(map(self._engine.bytes_of.__getitem__, ids))  # pyright: ignore
        except KeyError as error:
            raise self._no_such(error.args[0]) from None
        except TypeError:  # integers of another library
            return self._join(listed_ids(ids))

    def _piece(self, token: int, first: bool) -> bytes:
        return self._engine.bytes_of[token]


def train(
    texts: Texts,
    *,
    vocab_size: int,
    min_frequency: int = 0,
    special_tokens: Sequence[str] = (),
    pattern: Pattern = patterns.GPT2,
    progress: bpe_training.Progress | None = None,
) -> Bpe:
    """Learns a byte-level vocabulary: the ids are special tokens, 256 bytes, merges.

    Each merge joins the pair with the highest count over all words; of equals, the one with the
    smaller left id, then right id. This is what the `BpeTrainer` of Hugging Face does with the
    byte-level alphabet, tie for tie. The order of the texts does not matter.

    Args:
        texts: Documents, as strings or paths of files; words never reach from one into the next.
        vocab_size: Size of the vocabulary; training ends before it if no pair is left.
        min_frequency: The count that a pair needs to be merged. The token may be rarer in the end.
        special_tokens: Names; none is looked for in the texts.
        pattern: How texts are cut into words.
        progress: Called with the number of merges made and wanted.

    Raises:
        ValueError: If the vocabulary is smaller than the special tokens and 256 bytes, or special
            tokens repeat.

    References:
        Sennrich et al. 2016, algorithm 1. https://arxiv.org/abs/1508.07909
    """
    check_special(special_tokens)
    special = {name: i for i, name in enumerate(special_tokens)}
    smallest = len(special) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the alphabet: {len(special)} special tokens "
            f"and 256 bytes need {smallest}."
        )
    order = byte_alphabet.order()
    words, lengths, counts = bpe_training.count_words(texts, pattern)
    ids = np.zeros(256, np.int32)
    ids[order] = np.arange(len(special), smallest)
    tokens: list[bytes | None] = [None] * len(special) + [bytes([byte]) for byte in order]
    merges = bpe_training.merge_words(
        ids[words], lengths, counts, tokens, vocab_size - smallest, min_frequency, progress
    )
    return Bpe(tokens=tuple(tokens), merges=merges, pattern=pattern, special_tokens=special)


class _Engine:
    """What encoding needs of a tokenizer; made once."""

    def __init__(self, tokenizer: Bpe) -> None:
        self.starts = tokenizer.pattern.starts
        self.merges = merging.Merges(tokenizer.merges, tokenizer._results)
        self._whole = tokenizer._ids if tokenizer.whole_words else {}
        self.words = word_ids.WordIds(self.encode)
        ids = tokenizer._ids
        self.byte_ids = np.array([ids.get(bytes([i]), -1) for i in range(256)], np.int32)
        self.bytes_of = {i: token for i, token in enumerate(tokenizer.tokens) if token is not None}
        self.bytes_of |= {i: name.encode() for name, i in tokenizer.special_tokens.items()}
        self._size = tokenizer.vocab_size
        self.integers = np.arange(self._size).astype(object)  # shared by all lists: none is made

    def encode(self, octets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of distinct words, word after word, and their number for each."""
        symbols = self.byte_ids[octets]
        if symbols.size and int(symbols.min()) < 0:
            byte = int(octets[symbols < 0][0])
            raise ValueError(f"The vocabulary has no token for the byte 0x{byte:02X}.")
        merged, counts = self._merge(symbols, lengths)
        return (
            self._whole_words(octets, lengths, merged, counts) if self._whole else (merged, counts)
        )

    def _merge(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Merges the long words with each other, and the others."""
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

    def _whole_words(
        self, octets: np.ndarray, lengths: np.ndarray, merged: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Words that are tokens become them, whatever the merges gave."""
        data, bounds = octets.tobytes(), [0, *np.cumsum(lengths).tolist()]
        words = (data[start:end] for start, end in itertools.pairwise(bounds))
        found = np.array([self._whole.get(word, -1) for word in words], np.int32)
        hit = found >= 0
        first = np.cumsum(counts) - counts
        keep = np.ones(merged.size, bool)
        keep[ragged(first[hit] + 1, counts[hit] - 1)] = False
        merged[first[hit]] = found[hit]
        return merged[keep], np.where(hit, 1, counts)

    @property
    def spelling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens' bytes in a row, and each id's first and last; up to the first unused id."""
        made = vars(self).get("_spelling")
        if made is None:
            tokens = list(
                map(
                    self.bytes_of.__getitem__,
                    itertools.takewhile(self.bytes_of.__contains__, range(self._size)),
                )
            )
            lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
            blob, ends = np.frombuffer(b"".join(tokens), np.uint8), np.cumsum(lengths)
            made = vars(self)["_spelling"] = (blob, ends - lengths, ends - 1)
        return made


def _joined(words: Sequence[bytes]) -> word_ids.Words:
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    return b"".join(words), np.cumsum(lengths) - lengths, lengths


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
    if distinct(merges[:, 0].astype(np.int64) << 32 | merges[:, 1]).size < len(merges):
        seen: set[tuple[int, ...]] = set()
        twice = next(p for p in map(tuple, merges.tolist()) if p in seen or seen.add(p))
        raise ValueError(f"The merge of {twice[0]} with {twice[1]} is there twice.")
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
