"""BERT's words: those of the Rust library, for every code point and for marks among each other."""

import itertools
import random

import numpy as np
import pytest

from jaxformer.tokenizers import bert_tables, bert_text
from jaxformer.tokenizers.bert_text import CASED, UNCASED, BertText

TEXTS = [
    BertText(lowercase=lowercase, strip_accents=strip, clean=clean, chinese=chinese)
    for lowercase, strip, clean, chinese in itertools.product(
        (True, False), (None, True, False), (True, False), (True, False)
    )
]
SCALARS = np.setdiff1d(np.arange(0x110000), np.arange(0xD800, 0xE000))


def words_at_once(cutter, texts):
    """The words of each text, from the arrays."""
    cut = cutter.cut(texts)
    spans = zip(cut.starts.tolist(), (cut.starts + cut.sizes).tolist())
    words = [cut.data[start:end].decode() for start, end in spans]
    assert [len(word) for word in words] == cut.characters.tolist()
    bounds = [0, *cut.ends.tolist()]
    return [words[start:end] for start, end in itertools.pairwise(bounds)]


@pytest.fixture(scope="module")
def rust():
    """The words of a text as the Rust library's tokenizers give them."""
    tokenizers = pytest.importorskip("tokenizers")

    def words(value, text):
        normalizer = tokenizers.normalizers.BertNormalizer(
            clean_text=value.clean,
            handle_chinese_chars=value.chinese,
            strip_accents=value.strip_accents,
            lowercase=value.lowercase,
        )
        split = tokenizers.pre_tokenizers.BertPreTokenizer()
        return [word for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))]

    return words


def documents(count, seed):
    """Texts of all planes, most of them of marks and what decomposes."""
    draw = random.Random(seed)
    traits = bert_tables.traits()
    ranked = np.flatnonzero(traits & bert_tables.RANK)
    pools = [
        SCALARS,
        np.arange(128),
        np.arange(0x20, 0x300),
        ranked,
        ranked[traits[ranked] & bert_tables.MARK == 0],
        bert_tables.composed().keys,
        bert_tables.upper().keys,
        np.array([32, 9, 10, 13, 11, 12, 0x85, 0xA0, 0x3000, 0x2028, 0x1C]),
        np.arange(0x3000, 0x3100),
        np.arange(0x4E00, 0x4F00),
    ]
    for _ in range(count):
        text: list[str] = []
        size = draw.choice([1, 4, 12, 40, 300])
        while len(text) < size:
            pool = draw.choice(pools)
            text += [chr(pool[draw.randrange(pool.size)]) for _ in range(draw.choice([1, 2, 5]))]
        yield "".join(text)


def test_words_are_what_one_sees():
    cutter = bert_text.Cutter(UNCASED)
    assert cutter.words("Hello,  WORLD! it's") == ["hello", ",", "world", "!", "it", "'", "s"]
    assert cutter.words("Crème BRÛLÉE Ångström") == ["creme", "brulee", "angstrom"]
    assert cutter.words("東京tower") == ["東", "京", "tower"]
    assert cutter.words("a\x00b\u200bc\ufffdd\te\u3000f") == ["abcd", "e", "f"]
    assert bert_text.Cutter(CASED).words("Crème,東") == ["Crème", ",", "東"]
    kept = BertText(lowercase=True, strip_accents=False, chinese=False)
    assert bert_text.Cutter(kept).words("CRÈME 東京") == ["crème", "東京"]


def test_marks_that_remain_stand_in_canonical_order():
    cutter = bert_text.Cutter(UNCASED)
    low, high = "\u302e", "\U0001d16d"  # not dropped, of the classes 224 and 226
    assert cutter.words(f"a{high}{low}") == cutter.words(f"a{low}{high}") == [f"a{low}{high}"]
    assert cutter.words(f"a{high}\u0301{low}b") == [f"a{low}{high}b"]
    assert cutter.words(f"a{high}\x00{low}b") == [f"a{low}{high}b"]
    assert cutter.words(f"a{high}\u034f{low}b") == [f"a{high}{low}b"]  # a mark that stays between
    assert cutter.words(f"a{high} {low}") == [f"a{high}", low]
    assert bert_text.Cutter(CASED).words(f"a{high}{low}") == [f"a{high}{low}"]


@pytest.mark.parametrize("value", TEXTS, ids=str)
def test_words_of_any_text_are_those_of_the_rust_library(value, rust):
    cutter = bert_text.Cutter(value)
    texts = list(documents(60, seed=TEXTS.index(value)))
    expected = [rust(value, text) for text in texts]
    assert [cutter.words(text) for text in texts] == expected
    assert [word for i in range(0, 60, 5) for word in words_at_once(cutter, texts[i : i + 5])] == (
        expected
    )


@pytest.mark.parametrize("value", [UNCASED, CASED])
def test_every_character_is_treated_as_in_the_rust_library(value, rust):
    """All but private-use and unassigned planes, of which one in 40; each between two letters."""
    codes = np.union1d(SCALARS[SCALARS < 0x32000], SCALARS[::40])
    texts = [" ".join(f"a{chr(code)}b" for code in part) for part in np.array_split(codes, 60)]
    assert words_at_once(bert_text.Cutter(value), texts) == [rust(value, text) for text in texts]


def test_cutting_at_once_is_cutting_one_by_one():
    cutter = bert_text.Cutter(UNCASED)
    plain = ["", "a b", "", "", "C,", " "]
    assert words_at_once(cutter, plain) == [cutter.words(text) for text in plain]
    assert words_at_once(cutter, [*plain, "é"]) == [*map(cutter.words, plain), ["e"]]
    assert words_at_once(cutter, ["a", "b"]) == [["a"], ["b"]]
    assert words_at_once(cutter, ["é", "\u0301", "漢"]) == [["e"], [], ["漢"]]
    assert words_at_once(cutter, [""]) == [[]]


def test_blocks_hold_every_text_whole_or_cut_where_no_word_goes_on(monkeypatch):
    monkeypatch.setattr(bert_text, "_BLOCK", 50)
    cutter = bert_text.Cutter(UNCASED)
    texts = [*documents(40, seed=7), "", "ab " * 100, "字。" * 100, "x" * 300, "é" * 120 + " é"]
    words, held = [], []
    for block, whole in bert_text.blocks(texts):
        for i, part in enumerate(words_at_once(cutter, block)):
            held += part
            if i in whole:
                words.append(held)
                held = []
    assert words == [cutter.words(text) for text in texts]
    assert not held


def test_a_cutter_forgets_characters_when_it_knows_too_many(monkeypatch):
    monkeypatch.setattr(bert_text, "_SPELLED", 10)
    cutter = bert_text.Cutter(UNCASED)
    text = " ".join(map(chr, range(0xC0, 0x180)))
    assert cutter.words(text) == words_at_once(cutter, [text])[0]
    assert len(cutter._spelled) <= 10
