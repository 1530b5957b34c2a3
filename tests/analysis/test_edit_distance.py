import random

import numpy as np

from jaxformer.analysis.edit_distance import levenshtein


def by_table(left, right):
    table = np.add.outer(np.arange(len(left) + 1), np.arange(len(right) + 1))
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            ways = table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)
            table[i, j] = min(ways)
    return table[-1, -1]


def test_known_distances():
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "") == levenshtein([7, 7], [7, 7]) == 0
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3
    assert levenshtein("abab", "baba") == 2
    assert levenshtein("aXa", "aa") == levenshtein("aa", "aaa") == 1


def test_distances_are_those_of_the_whole_table():
    draw = random.Random(0)
    for _ in range(500):
        left = draw.choices("abc", k=draw.randrange(12))
        right = draw.choices("abcd", k=draw.randrange(12))
        assert levenshtein(left, right) == by_table(left, right)


def test_long_sequences_of_other_items_are_quick():
    assert levenshtein(range(5000), range(5000, 0, -1)) >= 4999
