import collections
import math

import numpy as np
import pytest

from jaxformer.analysis import ngram


def by_formula(training, held_out, vocab_size, order):
    """Witten and Bell's recursion with dictionaries."""
    follows = collections.defaultdict(collections.Counter)
    for sequence in training:
        for i, token in enumerate(sequence):
            for n in range(min(order, i + 1)):
                follows[tuple(sequence[i - n : i])][token] += 1

    def probability(token, context):
        counts = follows.get(context, {})
        below = probability(token, context[1:]) if context else 1 / vocab_size
        if not counts:
            return below
        total, kinds = sum(counts.values()), len(counts)
        return (counts.get(token, 0) + kinds * below) / (total + kinds)

    bits = 0.0
    for sequence in held_out:
        for i, token in enumerate(sequence):
            bits -= math.log2(probability(token, tuple(sequence[max(i - order + 1, 0) : i])))
    return bits


def sequences(seed, count, vocab_size):
    random = np.random.default_rng(seed)
    return [
        random.integers(0, vocab_size, random.integers(0, 40)) ** 2 % vocab_size
        for _ in range(count)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_bits_are_those_of_the_formula(order):
    training, held_out = sequences(0, 20, 7), sequences(1, 5, 7)
    expected = by_formula([x.tolist() for x in training], [x.tolist() for x in held_out], 7, order)
    found = ngram.total_bits(training, held_out, vocab_size=7, order=order)
    assert found == pytest.approx(expected, rel=1e-12)


def test_one_case_by_hand():
    """After a, b and a the unigrams are (2 + 2/3)/5 and (1 + 2/3)/5; c has (2/3)/5."""
    training, held_out = [np.array([0, 1, 0])], [np.array([0, 2])]
    expected = -math.log2((2 + 2 / 3) / 5) - math.log2(2 / 3 / 5)
    assert ngram.total_bits(training, held_out, vocab_size=3, order=1) == pytest.approx(expected)
    # After a, one token of one kind followed, and c has half of what it had.
    assert ngram.total_bits(training, held_out, vocab_size=3) == pytest.approx(expected + 1)


def test_without_training_every_id_is_as_likely():
    assert ngram.total_bits([], [np.arange(5)], vocab_size=16, order=3) == pytest.approx(20)
    assert ngram.total_bits([np.arange(5)], [], vocab_size=16) == 0


def test_a_model_without_an_order_is_refused():
    with pytest.raises(ValueError, match="order >= 1, got 0"):
        ngram.total_bits([], [], vocab_size=2, order=0)
