import numpy as np
import pytest

from jaxformer.tokenizers.wordtable import INLINE, WordTable


def numbered(table: WordTable, words: list[bytes]) -> list[int]:
    lengths = np.array([len(word) for word in words])
    return table.number(b"".join(words), np.cumsum(lengths) - lengths, lengths).tolist()


def random_words(number: int, longest: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, number)
    return [rng.integers(0, 3, size, np.uint8).tobytes() for size in lengths.tolist()]


@pytest.mark.parametrize("longest", [3, 9, INLINE + 9])
def test_equal_words_and_they_alone_share_a_number(longest):
    table, seen = WordTable(), {}
    for seed in range(4):  # zeros at a word's end, and words that are others' beginnings
        words = random_words(30_000, longest, seed)
        for word, number in zip(words, numbered(table, words)):
            assert seen.setdefault(word, number) == number
    assert sorted(seen.values()) == list(range(table.size))


def test_spelling_gives_back_the_words_from_a_number_on():
    table = WordTable()
    words = [b"a", b"b" * INLINE, b"c" * (INLINE + 1), b"\0", b"d" * 100, b"ef"]
    assert numbered(table, words) is not None
    by_number = sorted(zip(numbered(table, words), words))
    for first in range(len(words) + 1):
        octets, lengths = table.spelling(first)
        kept = [word for _, word in by_number[first:]]
        assert octets.tobytes() == b"".join(kept)
        assert lengths.tolist() == [len(word) for word in kept]
