import pytest

from jaxformer.analysis import morphemes
from jaxformer.tokenizers import alphabets, plain


def test_the_list_is_of_different_words_with_parts():
    words = morphemes.english()
    assert len(words) > 1000
    assert len({"".join(parts) for parts in words}) == len(words)
    assert all(len(parts) > 1 and "".join(parts).isalpha() for parts in words)
    assert ("un", "kind", "ness") in words


def test_bytes_cut_everywhere():
    precision, recall, f1 = morphemes.agreement(plain.Bytes(), [("un", "do"), ("re", "play", "s")])
    assert (precision, recall) == (3 / 9, 1)
    assert f1 == pytest.approx(2 * (3 / 9) / (1 + 3 / 9))


def test_whole_words_are_never_cut():
    tokenizer = plain.Words.train([" undo replays"])
    assert morphemes.agreement(tokenizer, [("un", "do"), ("re", "play", "s")]) == (None, 0, 0)


def test_words_that_are_lost_or_refused_count_as_not_cut():
    for tokenizer in (plain.Words.train(["a"]), alphabets.dna()):
        assert morphemes.word_cuts(tokenizer, "undo") == set()
    assert morphemes.agreement(plain.Bytes(), []) == (None, None, None)


def test_cuts_are_counted_in_bytes_from_the_words_start():
    assert morphemes.word_cuts(plain.Characters.train(["né "]), "né") == {1}
    assert morphemes.word_cuts(plain.Bytes(), "né") == {1, 2}
