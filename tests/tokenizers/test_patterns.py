"""The array forms cut as the expressions do, and those as the engines of the Rust tools."""

import itertools
import random

import numpy as np
import pytest

from jaxformer.tokenizers import patterns, pretokens

PIECES = (
    *("a", "b", "s", "t", "re", "ll", "ve", "d", "m", "S", "T", "RE", "'", "'", "’", "ſ"),
    *("0", "1", "23", "456", "7", "٣", "½", "Ⅷ", ".", "-", "--", "/", "//", "_", "!"),
    *("é", "É", "ǅ", "ʰ", "ª", "日", "本", "語", "ア", "ー", "ا", "ب", "ह", "ि", "ß", "İ"),
    *("❤", "😀", "👩", "A", "B", "C", "xyz", "XYZ", "𝐀", "﷽"),
    *(" ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "\u0301", "\u093e"),
    *("\ufe0f", "\u200d", "\u200b", "\ufffd", "\x00", "\U000e0100", "\U0010ffff", "\ue000"),
)
FOCUSED = (
    PIECES,
    ("'", "s", "re", "t", "l", "x", " "),
    ("\n", " ", "-", "/", "a", "\r"),
    ("A", "a", "日", "\u0301", "'s", " ", "-"),
)
ALL = [(family, digits) for family in patterns.FAMILIES for digits in patterns.DIGITS]


def documents(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def document() -> str:
        length = rng.randrange(14)
        if rng.random() < 0.15:
            spans = ((0x20, 0x250), (0, 0xD800), (0xE000, 0x110000))
            return "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(length))
        return "".join(rng.choices(rng.choice(FOCUSED), k=length))

    return [document() for _ in range(number)]


def array_words(pattern: patterns.Pattern, texts: list[str]) -> list[str]:
    """Cuts many texts in one call, as the tokenizer does."""
    joined = "\n".join(texts)
    gaps = np.cumsum([len(text) + 1 for text in texts])[:-1] - 1
    if joined.isascii():
        data = bytearray(joined, "ascii")
        for gap in gaps:
            data[gap] = pretokens.BREAK_BYTE
        starts = pattern.starts(bytes(data))
    else:
        codes = np.frombuffer(joined.encode("utf-32-le"), "<u4").copy()
        codes[gaps] = pretokens.BREAK_CODE
        starts = pattern.starts(codes)
    bounds = np.flatnonzero(starts).tolist()
    assert bounds[-1] == len(joined)
    gaps = set(gaps.tolist())
    return [joined[i:j] for i, j in itertools.pairwise(bounds) if i not in gaps]


@pytest.mark.parametrize(("family", "digits"), ALL)
def test_the_array_form_cuts_as_the_expression(family, digits):
    pattern = patterns.FAMILIES[family](digits)
    texts = [text for text in documents(700, seed=len(family + digits)) if text]
    for i in range(0, len(texts), 7):
        some = texts[i : i + 7]
        assert array_words(pattern, some) == [w for text in some for w in pattern.split(text)]


@pytest.mark.parametrize(("family", "digits"), ALL)
def test_the_expression_cuts_as_in_the_engine_of_tokenizers(family, digits):
    tokenizers = pytest.importorskip("tokenizers")
    pattern = patterns.FAMILIES[family](digits)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern.regex), "isolated")
    for text in documents(600, seed=len(family + digits) + 1):
        assert pattern.split(text) == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("spelling", list(patterns._SPELLINGS))
def test_a_known_spelling_cuts_as_the_family_that_stands_for_it(spelling):
    known, literal = patterns.published(spelling), patterns.Pattern(spelling)
    assert known.regex != spelling
    assert known.starts is not None
    for text in documents(1500, seed=3):
        assert known.split(text) == literal.split(text)


def test_the_two_published_patterns_of_cl100k_differ_at_the_end_of_a_text():
    assert patterns.CL100K.split("x\n  ") == ["x", "\n", "  "]
    assert patterns.CL100K_TIKTOKEN.split("x\n  ") == ["x", "\n  "]


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("free", ["a", " 1234567"]),
        ("single", ["a", " ", *"1234567"]),
        ("threes", ["a", " ", "123", "456", "7"]),
        ("threes_from_right", ["a", " ", "1", "234", "567"]),
    ],
)
def test_digits_are_cut_by_policy(digits, words):
    assert patterns.gpt2(digits).split("a 1234567") == words


def test_any_expression_is_a_pattern_and_its_gaps_are_words():
    pattern = patterns.Pattern(r"\p{Lu}\p{^Lu}+")
    assert pattern.starts is None
    assert pattern.split("xAbcDe!F") == ["x", "Abc", "De!", "F"]
    assert patterns.Pattern(r"[\S]+").split("a\x1cb c") == ["a\x1cb", " ", "c"]


def test_an_unknown_policy_or_a_malformed_expression_is_refused():
    with pytest.raises(ValueError, match="threes_from_right, got 'pairs'"):
        patterns.gpt2("pairs")
    with pytest.raises(ValueError, match=r"'\(' is malformed"):
        patterns.Pattern("(").split("a")


@pytest.mark.parametrize("regex", ["(?=[A-Z])", "a*", "x?", ""])
def test_empty_matches_are_no_words_and_lose_nothing(regex):
    for text in ("abCdE", "aab", "", "x"):
        words = patterns.Pattern(regex).split(text)
        assert "".join(words) == text
        assert all(words)


def test_digits_are_those_of_the_frozen_tables_and_ambiguous_classes_are_refused():
    assert patterns.Pattern(r"\d+").split("a\U00011de0b") == patterns.Pattern(r"\p{Nd}+").split(
        "a\U00011de0b"
    )
    for regex in (r"\w+", r"\ba", r"[\W]"):
        with pytest.raises(ValueError, match="has many meanings"):
            patterns.Pattern(regex).split("a")
