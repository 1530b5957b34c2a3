"""The forms for many words agree with the plain one, and that with a slower one still."""

import itertools

import numpy as np
import pytest

from jaxformer.tokenizers import merging


def draw(seed: int, nested: bool) -> tuple[np.ndarray, np.ndarray]:
    """Merges over three symbols: results that are new each time, or any."""
    rng = np.random.default_rng(seed)
    pairs, results = [], []
    for rank in range(40):
        known = 3 + rank if nested else 20
        pair = tuple(rng.integers(0, known, 2).tolist())
        if pair not in pairs:
            pairs.append(pair)
            results.append(3 + rank if nested else int(rng.integers(3, 20)))
    return np.array(pairs), np.array(results)


def slowly(ids: list[int], ranks: dict, results: list[int]) -> list[int]:
    """The definition: search, replace, repeat."""
    while True:
        found = [(ranks.get(pair, 1000), i) for i, pair in enumerate(itertools.pairwise(ids))]
        rank, i = min(found, default=(1000, 0))
        if rank == 1000:
            return ids
        ids = [*ids[:i], results[rank], *ids[i + 2 :]]


def words(seed: int, number: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, n).tolist() for n in rng.integers(1, longest + 1, number)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_all_forms_merge_alike(seed, nested):
    pairs, results = draw(seed, nested)
    ranks = {tuple(pair): rank for rank, pair in enumerate(pairs.tolist())}
    merges = merging.Merges(pairs, results)
    some = words(seed, 150, 30)
    expected = [slowly(word, ranks, results.tolist()) for word in some]
    assert [merging.merge(word, ranks, results.tolist()) for word in some] == expected

    flat = np.array([symbol for word in some for symbol in word], np.int32)
    lengths = np.array([len(word) for word in some])
    for form in (merges.merge_words, merges.merge_long):
        merged, counts = form(flat.copy(), lengths)
        assert counts.tolist() == [len(word) for word in expected]
        assert merged.tolist() == [symbol for word in expected for symbol in word]


def test_merges_are_nested_when_parts_come_first_and_results_once():
    assert merging.Merges(np.array([[0, 1], [2, 0]]), np.array([2, 3])).nested
    assert not merging.Merges(np.array([[2, 0], [0, 1]]), np.array([3, 2])).nested
    assert not merging.Merges(np.array([[0, 1], [1, 0]]), np.array([2, 2])).nested


def test_ranks_of_all_pairs_are_found_and_no_others():
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 2000, (5000, 2)), axis=0)
    merges = merging.Merges(pairs, np.arange(len(pairs)) + 2000)
    assert merges.ranks(pairs[:, 0], pairs[:, 1]).tolist() == list(range(len(pairs)))
    known = {tuple(pair) for pair in pairs.tolist()}
    others = rng.integers(0, 2000, (5000, 2))
    others = others[[tuple(pair) not in known for pair in others.tolist()]]
    assert (merges.ranks(others[:, 0], others[:, 1]) == merging.NONE).all()


def test_too_many_symbols_are_refused():
    with pytest.raises(ValueError, match="2097152"):
        merging.Merges(np.array([[0, 1]]), np.array([1 << 21]))
