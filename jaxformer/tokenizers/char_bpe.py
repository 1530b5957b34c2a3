"""Byte pair encoding of characters with a mark at the ends of words: the classic form."""

import collections
import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxformer.tokenizers import bpe_training, hf_json, listed, merging, unicode
from jaxformer.tokenizers.listed import Listed
from jaxformer.tokenizers.tokenizer import Ids, Texts, documents, listed_ids

_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 64  # characters


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CharBpe(Listed):
    """Merges characters, the last of each word together with a mark that the word ends there.

    Words are what stands between white space, which is lost: words decode with one space between
    them. A character that has no token, where it stands, becomes the unknown token, or a ValueError
    if there is none; characters inside a word and at its end are told apart.

    Attributes:
        tokens: The characters of each id, those that end a word with the mark behind them.
        merges: Left and right id of each merge (M, 2), in order of priority; the result is the
            token of the characters joined.
        end_of_word: The mark.
        unknown: The special token for characters that have none.

    Raises:
        ValueError: If a merge names or gives no token, or the mark is empty.

    References:
        Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
        section 3.2 (the mark is a symbol of its own there; joined to the last character, as in the
        authors' subword-nmt since version 0.2, here). https://arxiv.org/abs/1508.07909
    """

    merges: np.ndarray
    end_of_word: str = "</w>"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.end_of_word:
            raise ValueError("The mark at the ends of words is empty.")
        merges = np.array(self.merges, np.int32).reshape(-1, 2)
        merges.setflags(write=False)
        object.__setattr__(self, "merges", merges)
        pairs = list(map(tuple, merges.tolist()))
        ranks = {pair: rank for rank, pair in enumerate(pairs)}
        if len(ranks) < len(pairs):
            twice = collections.Counter(pairs).most_common(1)[0][0]
            raise ValueError(f"The tokens {twice[0]} and {twice[1]} are merged twice.")
        results = [self._result(*pair) for pair in pairs]
        vars(self).update(_ranks=ranks, _results=results, _known={})

    def _result(self, left: int, right: int) -> int:
        inside = min(left, right) >= 0 and max(left, right) < len(self.tokens)
        a, b = (self.tokens[left], self.tokens[right]) if inside else (None, None)
        if a is None or b is None or a + b not in self._ids:
            raise ValueError(f"The merge of {left} and {right}, {a!r} and {b!r}, gives no token.")
        return self._ids[a + b]

    def truncate(self, size: int) -> "CharBpe":
        """The tokenizer that training with a smaller vocabulary would have given: merges nest.

        Raises:
            ValueError: If the size is larger than the vocabulary, or leaves out a special token or
                a character.
        """
        results = np.array(vars(self)["_results"], np.int32)
        merged = set(results.tolist())
        kept = {i for i, token in enumerate(self.tokens) if token is not None} - merged
        smallest = 1 + max([*kept, *self.special_tokens.values()], default=0)
        if not smallest <= size <= self.vocab_size:
            raise ValueError(f"truncate takes {smallest} to {self.vocab_size} tokens, got {size}.")
        merges = self.merges[results < size]
        return dataclasses.replace(self, tokens=self.tokens[:size], merges=merges)

    # Encoding.

    def _encode(self, text: str) -> list[int]:
        known = vars(self)["_known"]
        tokens: list[int] = []
        for match in _word().finditer(text):
            word = match.group()
            ids = known.get(word)
            tokens += self._learn(word, match.start()) if ids is None else ids
        return tokens

    def _learn(self, word: str, position: int) -> tuple[int, ...]:
        """Encodes a word that was not in the cache."""
        state = vars(self)
        symbols = [self._symbol(c, position + i) for i, c in enumerate(word[:-1])]
        symbols.append(self._symbol(word[-1], position + len(word) - 1, self.end_of_word))
        ids = tuple(merging.merge(symbols, state["_ranks"], state["_results"]))
        if len(word) <= _CACHED_LENGTH:
            if len(state["_known"]) >= _CACHED_WORDS:
                state["_known"].clear()
            state["_known"][word] = ids
        return ids

    def _symbol(self, character: str, position: int, mark: str = "") -> int:
        token = self._ids.get(character + mark)
        if token is not None:
            return token
        if self.unknown_id is None:
            raise self._unlisted(character, position, " (where a word ends)" if mark else "")
        return self.unknown_id

    # Decoding.

    def _ends_word(self, token: SupportsIndex) -> bool:
        token = operator.index(token)
        string = self.tokens[token] if 0 <= token < len(self.tokens) else None
        return string is not None and string.endswith(self.end_of_word)

    def _piece(self, token: int, first: bool) -> bytes:
        piece = super()._piece(token, first)
        if not self._ends_word(token):
            return piece
        return piece[: -len(self.end_of_word.encode())] + b" "

    def decode_bytes(self, ids: Ids) -> bytes:
        """Turns ids into UTF-8, with a space after each word but the last."""
        tokens = listed_ids(ids)
        spelled = vars(self).get("_spelled")
        if spelled is None:
            known = (*self._ids.values(), *self.special_tokens.values())
            spelled = vars(self)["_spelled"] = {i: self.token_bytes(i) for i in known}
        try:
            data = b"".join(map(spelled.__getitem__, tokens))
        except KeyError as error:
            raise self._no_such(error.args[0]) from None
        return data[:-1] if tokens and self._ends_word(tokens[-1]) else data

    def decode_stream(self, ids: Ids, *, errors: str = "replace") -> Iterator[str]:
        """Yields the text of ids as they come; the space after a word comes with the next."""
        space = ""
        for token in ids:
            text = space + self.token_bytes(token).decode("utf-8", errors)
            space = " " if self._ends_word(token) else ""
            yield text.removesuffix(space)

    # Files.

    def to_json(self) -> dict[str, Any]:
        """Describes the value in the layout of Hugging Face's `tokenizer.json`."""
        merges = [[self.tokens[a], self.tokens[b]] for a, b in self.merges.tolist()]
        return hf_json.document(
            self.special_tokens,
            pre_tokenizer={"type": "WhitespaceSplit"},
            decoder={"type": "BPEDecoder", "suffix": self.end_of_word},
            model=hf_json.bpe_model(
                self._ids, merges, unknown=self.unknown, end_of_word=self.end_of_word
            ),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CharBpe":
        """Reads a `tokenizer.json`.

        Without an unknown token the other library drops characters that it does not know; here
        they are an error.

        Raises:
            ValueError: If it is malformed, or holds what would change ids and is not supported.
        """
        model = data["model"]
        hf_json.refuse(data.get("normalizer"), "normalizer")
        if data.get("pre_tokenizer") != {"type": "WhitespaceSplit"}:
            raise ValueError(
                f"the pre_tokenizer {data.get('pre_tokenizer')!r:.80} is not supported for BPE of "
                "characters; known is WhitespaceSplit"
            )
        unknown = model.get("unk_token")
        for name in ("continuing_subword_prefix", "byte_fallback", "ignore_merges"):
            if model.get(name):
                raise ValueError(f"{name} = {model[name]!r} is not supported for BPE of characters")
        if model.get("fuse_unk") and unknown is not None:
            raise ValueError("fuse_unk is not supported for BPE of characters")
        vocab = hf_json.vocabulary(model)
        specials = hf_json.added_tokens(data, vocab)
        if unknown is not None and specials.setdefault(unknown, vocab.get(unknown, -1)) < 0:
            raise ValueError(f"the unknown token {unknown!r} is not in model.vocab")
        ordinary = {string: i for string, i in vocab.items() if string not in specials}
        tokens: list[str | None] = [None] * (1 + max(ordinary.values(), default=-1))
        for string, i in ordinary.items():
            tokens[i] = string
        return cls(
            tokens=tuple(tokens),
            merges=hf_json.merge_ids(model, vocab, specials),
            end_of_word=model["end_of_word_suffix"],
            unknown=unknown,
            special_tokens=specials,
        )


def train(
    texts: Texts,
    *,
    vocab_size: int,
    min_frequency: int = 0,
    special_tokens: Sequence[str] = (),
    end_of_word: str = "</w>",
    unknown: str | None = None,
    limit_alphabet: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CharBpe:
    """Learns a vocabulary: special tokens, characters, characters that end words, merges.

    Each merge joins the pair with the highest count over all words; of equals, the one with the
    smaller left id, then right id. Characters have ids in order of their code points, first those
    inside words (all that occur anywhere), then those that end one. This is what the `BpeTrainer`
    of Hugging Face does, except that there the order of the second kind is that of a hash table
    and changes from run to run, and with it the outcome between pairs of equal counts.

    Args:
        texts: Documents.
        vocab_size: Size of the vocabulary; training ends before it if no pair is left.
        min_frequency: The count that a pair needs to be merged.
        special_tokens: Names; none is looked for in the texts.
        end_of_word: The mark.
        unknown: The special token for characters without one; put first if not among them.
        limit_alphabet: Characters to keep, the most frequent ones, of equals the smaller code
            point. Others are left out of the words, whose rest moves together.
        progress: Called with the number of merges made and wanted.

    Raises:
        ValueError: If the vocabulary is smaller than the special tokens and characters, special
            tokens repeat, or a text holds the mark.
    """
    specials = _named(special_tokens, unknown)
    if not end_of_word or (limit_alphabet is not None and limit_alphabet < 0):
        raise ValueError(f"{end_of_word=} is empty or {limit_alphabet=} is negative.")
    words = _count(texts, end_of_word)
    spelled, names = _spell(words, specials, end_of_word, limit_alphabet)
    wanted = vocab_size - len(names)
    if wanted < 0:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the alphabet: special tokens and characters "
            f"are {len(names)}."
        )
    tokens = [None if name is None else name.encode() for name in names]
    merges = bpe_training.merge_words(*spelled, tokens, wanted, min_frequency, progress)
    return CharBpe(
        tokens=tuple(None if token is None else token.decode() for token in tokens),
        merges=merges,
        end_of_word=end_of_word,
        unknown=unknown,
        special_tokens=specials,
    )


def _named(special_tokens: Sequence[str], unknown: str | None) -> dict[str, int]:
    names = list(special_tokens)
    if unknown is not None and unknown not in names:
        names.insert(0, unknown)
    if len(set(names)) < len(names):
        raise ValueError(f"Special tokens repeat: {', '.join(names)}.")
    return {name: i for i, name in enumerate(names)}


def _count(texts: Texts, end_of_word: str) -> collections.Counter[str]:
    words: collections.Counter[str] = collections.Counter()
    for text in documents(texts):
        words.update(_word().findall(text))
    if held := next((word for word in words if end_of_word in word), None):
        raise ValueError(f"The word {held!r:.80} holds the mark {end_of_word!r} itself.")
    return words


def _spell(
    words: Mapping[str, int], specials: Mapping[str, int], end_of_word: str, limit: int | None
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str | None]]:
    """All words' symbols in a row, their number and count in each, and the symbols' strings."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    inside = sorted(listed.by_frequency(counts)[:limit])
    ends = sorted({word[-1] for word in words} & set(inside))
    names: list[str | None] = [None] * len(specials)
    names += inside + [character + end_of_word for character in ends]
    ids = {name: i for i, name in enumerate(names) if name is not None}
    symbols, lengths = [], []
    for word in words:
        before = len(symbols)
        symbols += [ids[character] for character in word[:-1] if character in ids]
        if word[-1] in ids:
            symbols.append(ids[word[-1] + end_of_word])
        lengths.append(len(symbols) - before)
    filled = np.array(lengths, np.int64) > 0
    arrays = (
        np.array(symbols, np.int32),
        np.array(lengths, np.int64)[filled],
        np.array(list(words.values()), np.int64)[filled],
    )
    return arrays, names


@functools.cache
def _word() -> re.Pattern[str]:
    """Matches a word. `re` itself takes four control characters for white space that are none."""
    spaces = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in unicode.runs(unicode.is_space()))
    return re.compile(f"[^{spaces}]+")
