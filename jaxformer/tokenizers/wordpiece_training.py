"""Trains WordPiece: merges pairs of pieces by a score until the vocabulary is full.

Distinct words are counted first. Their pieces then lie in one array as a linked list with a list of
places for each pair; a merge touches only the places of its pair, and the scores of all pairs are
computed anew, as every merge changes them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxformer.tokenizers import bert_text, wordpiece
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.ragged import grown
from jaxformer.tokenizers.tokenizer import Texts, documents
from jaxformer.tokenizers.wordtable import WordTable

Score = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""The worth of merging pairs, float64: from how often both stand side by side, how often the left
and the right one are there, and the number of all pieces."""

_PREFIX = "##"
_LOW = (1 << 32) - 1
_EQUAL = 1e-12  # scores this near, relatively, are equal: logarithms differ between machines
_TEXTS, _CHARACTERS = 1 << 10, 1 << 20  # bounds of what is counted at once


def likelihood(pair: np.ndarray, left: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """By how much a merge raises the log-likelihood of the text, in nats, to first order.

    The text is taken for independent pieces, so this is each pair's pointwise mutual information,
    times its count.

    References:
        Schuster & Nakajima 2012, who add the unit that raises the likelihood of the training data
        most. https://doi.org/10.1109/ICASSP.2012.6289079
    """
    return pair * np.log(total * pair / (left * right))


def ratio(pair: np.ndarray, left: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """count(pair) / (count(left) · count(right)), which is often given as WordPiece's score.

    It is highest, 1, for two pieces that occur once, together: with `min_frequency=1` it spells out
    words that occur once before it makes any common one, and the vocabulary is useless. It needs a
    floor of dozens or more, and then runs out of pairs early.
    """
    return pair / (left * right)


def frequency(pair: np.ndarray, left: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """The count of the pair: byte pair encoding, which the Rust library trains as WordPiece."""
    return pair


def train(
    texts: Texts,
    *,
    vocab_size: int,
    min_frequency: int = 5,
    special_tokens: Sequence[str] = wordpiece.SPECIAL_TOKENS,
    unknown: str | None = "[UNK]",
    text: BertText = bert_text.UNCASED,
    score: Score = likelihood,
    max_alphabet: int | None = 1000,
    max_characters: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> wordpiece.WordPiece:
    """Learns a vocabulary; the ids are special tokens, characters, merges in their order.

    Each merge joins the pair with the highest positive score wherever it stands, from the left; of
    equals, the one with the smaller left id, then right id. The order of the texts does not matter.
    No other pair gives the same piece later: what lies within a piece was merged alike everywhere.

    Every kept character becomes a token and, unless it always is a word by itself, another behind
    the prefix, in the order of code points: words of kept characters are never unknown, unless they
    are too long.

    Args:
        texts: Documents; words never reach from one into the next.
        vocab_size: Size of the vocabulary; training ends before it if no pair is left.
        min_frequency: The count that a pair needs to be merged. Well above 1 the scores that weigh
            a pair against its parts are kept from chance; see `ratio`. The token may be rarer in
            the end.
        special_tokens: Names; none is looked for in the texts.
        unknown: The special token of words that cannot be cut.
        text: How texts are normalised and cut into words.
        score: `likelihood`, `ratio`, `frequency` or another function of counts.
        max_alphabet: How many characters are kept, the most frequent, of equals the smaller code
            point; words with others are left out, as they become unknown. None keeps all.
        max_characters: Longer words are left out, as they become unknown.
        progress: Called with the number of tokens made and wanted, without those before merging.

    Raises:
        ValueError: If the vocabulary is smaller than special tokens and characters, special tokens
            repeat, `max_alphabet` is 0, or a text holds a lone surrogate.

    References:
        Schuster & Nakajima 2012. https://doi.org/10.1109/ICASSP.2012.6289079 (one unit per step as
        there, but marked are the pieces that continue a word, not those at its ends, and the
        likelihood is that of independent pieces instead of a language model).
    """
    special = {name: i for i, name in enumerate(special_tokens)}
    if len(special) < len(special_tokens):
        raise ValueError(f"Special tokens repeat: {', '.join(special_tokens)}.")
    if max_alphabet is not None and max_alphabet < 1:
        raise ValueError(f"max_alphabet is at least 1, got {max_alphabet}.")
    cutter = bert_text.Cutter(text)
    words = _Words(*_count_words(texts, cutter, max_characters))
    words.keep(_alphabet(words, max_alphabet))
    pieces, symbols = _characters(words, cutter)
    wanted = vocab_size - len(special) - len(pieces)
    if wanted < 0:
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than {len(special)} special tokens and the "
            f"alphabet, {len(pieces)} characters with and without {_PREFIX!r}."
        )
    _merge(_State(symbols, words), pieces, wanted, max(min_frequency, 1), score, progress)
    return wordpiece.WordPiece(
        tokens=(None,) * len(special) + tuple(pieces),
        special_tokens=special,
        unknown=unknown,
        prefix=_PREFIX,
        max_characters=max_characters,
        text=text,
    )


class _Words:
    """Distinct words.

    Attributes:
        codes: Their code points, one word after the other.
        sizes: Characters of each.
        counts: How often each occurs.
    """

    def __init__(self, codes: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> None:
        self.codes, self.sizes, self.counts = codes, sizes, counts

    def keep(self, alphabet: np.ndarray) -> None:
        """Leaves out the words with other characters than these, which are sorted."""
        owner = np.repeat(np.arange(self.sizes.size), self.sizes)
        known = np.bincount(owner, np.isin(self.codes, alphabet), self.sizes.size) == self.sizes
        self.codes = self.codes[known[owner]]
        self.sizes, self.counts = self.sizes[known], self.counts[known]


def _count_words(
    texts: Texts, cutter: bert_text.Cutter, max_characters: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table, counts = WordTable(), np.zeros(1 << 14, np.int64)
    for some in _batches(texts):
        for block, _ in bert_text.blocks(some):
            words = cutter.cut(block)
            short = words.characters <= max_characters
            before = table.size
            numbers = table.number(words.data, words.starts[short], words.sizes[short])
            counts = grown(counts, before, table.size)
            counts[: table.size] += np.bincount(numbers, minlength=table.size)
    octets, sizes = table.spelling()
    codes = np.frombuffer(octets.tobytes().decode().encode("utf-32-le"), "<i4")
    owner = np.repeat(np.arange(sizes.size), sizes)[octets.view(np.int8) >= -64]
    return codes, np.bincount(owner, minlength=sizes.size), counts[: table.size]


def _batches(texts: Texts) -> Iterator[list[str]]:
    """Groups texts, so that a stream of them is never held whole."""
    batch: list[str] = []
    size = 0
    for text in documents(texts):
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS or len(batch) == _TEXTS:
            yield batch
            batch, size = [], 0
    yield batch


def _alphabet(words: _Words, limit: int | None) -> np.ndarray:
    """The characters that are kept, in the order of code points."""
    codes, place = np.unique(words.codes, return_inverse=True)
    counts = np.bincount(place, np.repeat(words.counts, words.sizes), codes.size)
    return np.sort(codes[np.argsort(-counts, kind="stable")[:limit]])


def _characters(words: _Words, cutter: bert_text.Cutter) -> tuple[list[str], np.ndarray]:
    """The first pieces, and the piece of each character of the words."""
    alphabet = np.unique(words.codes)
    joins = cutter.joins(alphabet)
    heads = [chr(code) for code in alphabet.tolist()]
    tails = [_PREFIX + chr(code) for code in alphabet[joins].tolist()]
    is_head = np.zeros(words.codes.size, bool)
    is_head[np.cumsum(words.sizes) - words.sizes] = True
    place = np.searchsorted(alphabet, words.codes)
    return heads + tails, np.where(is_head, place, len(heads) - 1 + np.cumsum(joins)[place])


class _State:
    """All words as pieces, and where each pair of neighbours stands.

    Attributes:
        pieces: The piece at each place; a place that has been merged into the one before is dead.
        after, before: The next and the last living place of the word, or -1.
        weights: How often the word of each place occurs.
        pair: The pair that each place and the next one make, or -1.
        left, right, counts: Of each pair.
        places: Where each pair was born; it may stand there no more.
        uses: How often each piece occurs.
        total: How many pieces there are.
    """

    def __init__(self, symbols: np.ndarray, words: _Words) -> None:
        size, ends = symbols.size, np.cumsum(words.sizes)
        self.pieces = symbols.astype(np.int64)
        self.after = np.arange(1, size + 1)
        self.after[ends - 1] = -1
        self.before = np.arange(-1, size - 1)
        self.before[ends - words.sizes] = -1
        self.weights = np.repeat(words.counts, words.sizes)
        self.pair = np.full(size, -1)
        self.left, self.right, self.counts = (np.zeros(1 << 14, np.int64) for _ in range(3))
        self.places: list[np.ndarray] = []
        self.uses = np.bincount(self.pieces, self.weights, 1 << 14).astype(np.int64)
        self.total = int(self.weights.sum())
        self._dead = np.zeros(size, bool)
        self.add(np.flatnonzero(self.after >= 0))

    def add(self, places: np.ndarray) -> np.ndarray:
        """Notes the pairs, all new, that places and the next ones make; gives their numbers."""
        if not places.size:
            return places
        keys = self.pieces[places] << 32 | self.pieces[self.after[places]]
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        size, needed = len(self.places), len(self.places) + first.size
        self.left, self.right, self.counts = (
            grown(array, size, needed) for array in (self.left, self.right, self.counts)
        )
        self.left[size:needed], self.right[size:needed] = keys[first] >> 32, keys[first] & _LOW
        self.counts[size:needed] = np.add.reduceat(self.weights[places], first)
        bounds = [*first.tolist(), places.size]
        self.places.extend(places[start:end] for start, end in itertools.pairwise(bounds))
        pairs = np.arange(size, needed)
        self.pair[places] = np.repeat(pairs, np.diff(bounds))
        return pairs

    def merge(self, pair: int, piece: int) -> np.ndarray:
        """Puts a new piece in the place of a pair, wherever it is; gives the pairs this makes."""
        first = self._occurrences(pair)
        second = self.after[first]
        third, last = self.after[second], self.before[first]
        self._dead[second] = True
        last = last[last >= 0]
        last = last[~self._dead[last]]
        followed = third >= 0
        gone = np.concatenate([first, last, second[followed]])
        np.subtract.at(self.counts, self.pair[gone], self.weights[gone])
        self.pair[second] = self.pair[first] = -1

        uses = int(self.weights[first].sum())
        self.uses = grown(self.uses, self.uses.size, piece + 1)
        for part in (self.left[pair], self.right[pair]):
            self.uses[part] -= uses
        self.uses[piece] = uses
        self.total -= uses
        self.pieces[first] = piece
        self.after[first] = third
        self.before[third[followed]] = first[followed]
        return self.add(np.concatenate([last, first[followed]]))

    def _occurrences(self, pair: int) -> np.ndarray:
        """The first places of a pair; where it overlaps itself, every other from the left."""
        places, self.places[pair] = self.places[pair], np.zeros(0, np.int64)
        places = places[self.pair[places] == pair]
        if self.left[pair] != self.right[pair]:
            return places
        places.sort()
        starts = np.concatenate([[True], self.after[places[:-1]] != places[1:]])
        run = np.flatnonzero(starts)[np.cumsum(starts) - 1]
        return places[(np.arange(places.size) - run) % 2 == 0]


def _merge(
    state: _State,
    pieces: list[str],
    wanted: int,
    min_frequency: int,
    score: Score,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Merges pairs, and appends the pieces they make, until as many as wanted are there."""
    done = len(pieces) + wanted
    live = np.flatnonzero(state.counts[: len(state.places)] >= min_frequency)
    while len(pieces) < done:
        counts = state.counts[live]
        enough = counts >= min_frequency
        if 4 * np.count_nonzero(enough) < 3 * live.size:
            live, counts, enough = live[enough], counts[enough], enough[enough]
        pair = _best(state, live[enough], counts[enough], score)
        if pair is None:
            break
        right = pieces[state.right[pair]].removeprefix(_PREFIX)
        pieces.append(pieces[state.left[pair]] + right)
        born = state.merge(pair, len(pieces) - 1)
        live = np.concatenate([live, born[state.counts[born] >= min_frequency]])
        if progress is not None and (done - len(pieces)) % 64 == 0:
            progress(len(pieces) - done + wanted, wanted)
    if progress is not None:
        progress(wanted, wanted)


def _best(state: _State, live: np.ndarray, counts: np.ndarray, score: Score) -> int | None:
    """The pair with the highest positive score, of equals the smaller; None if there is none."""
    if not live.size:
        return None
    left, right = state.left[live], state.right[live]
    uses = state.uses.astype(np.float64)
    scores = score(counts.astype(np.float64), uses[left], uses[right], state.total)
    highest = scores.max()
    if not highest > 0:
        return None
    best = np.flatnonzero(scores >= highest * (1 - _EQUAL))
    return int(live[best[np.argmin(left[best] << 32 | right[best])]])
