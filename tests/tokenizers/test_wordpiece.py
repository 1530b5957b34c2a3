"""WordPiece: greedy pieces one can see, and the Rust library's ids on any text."""

import concurrent.futures
import gzip
import json
import lzma
import pickle
import random
import time

import numpy as np
import pytest

from jaxformer.tokenizers import wordpiece
from jaxformer.tokenizers.bert_text import CASED, BertText
from jaxformer.tokenizers.wordpiece import WordPiece

LINES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("un", "##aff", "##able", "##a", "a", ",", "'", "the", "##the", ".漢", "##s", "do"),
]
SMALL = WordPiece.from_tokens([*LINES, "é", "##é", "don", "t"])


def pieces(tokenizer, text):
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return [tokenizer.tokens[i] or names[i] for i in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def bert(real_data):
    data = gzip.decompress((real_data / "vocab/bert-base-uncased/tokenizer.json.gz").read_bytes())
    return WordPiece.from_json(json.loads(data))


def rust(tokenizers, tokenizer):
    """The Rust library's tokenizer, from the file that we write."""
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()))


def test_words_are_cut_greedily():
    assert pieces(SMALL, "Unaffable, the a") == ["un", "##aff", "##able", ",", "the", "a"]
    assert pieces(SMALL, "athe") == ["a", "##the"]
    assert pieces(SMALL, "") == []


def test_a_word_that_fails_anywhere_is_unknown_as_a_whole():
    assert pieces(SMALL, "unaffablex a") == ["[UNK]", "a"]
    assert pieces(SMALL, "##able") == ["[UNK]", "[UNK]", "[UNK]"]
    none = WordPiece.from_tokens(["a"], special_tokens=())
    assert none.encode("a") == [0]
    with pytest.raises(ValueError, match="The word 'ab' of 2 characters cannot be cut"):
        none.encode("a ab")
    with pytest.raises(ValueError, match="of 300 characters"):
        none.encode("b" * 300)


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_word_may_have_a_hundred_characters(letter):
    exact = WordPiece.from_tokens([*LINES, "é", "##é"], text=CASED)
    for filler in ("", " the" * 100):  # short texts and long ones go other ways
        text = f"{letter * 100} {letter * 101}{filler}"
        assert pieces(exact, text)[:101] == [letter] + [f"##{letter}"] * 99 + ["[UNK]"]


def test_text_never_becomes_a_special_token_unless_allowed():
    cls = SMALL.special_tokens["[CLS]"]
    assert cls not in SMALL.encode("[CLS] a")
    assert SMALL.encode("[CLS] a", allow_special=["[CLS]"]) == [cls, *SMALL.encode("a")]
    bare = WordPiece.from_tokens(["pad", "a", "[UNK]"], special_tokens=["pad", "[UNK]"])
    assert bare.encode("pad a") == [2, 1]


def test_frames_and_segments_are_those_of_bert():
    assert SMALL.with_cls_sep([9, 5]) == [2, 9, 5, 3]
    assert SMALL.with_cls_sep([9], [5, 6]) == [2, 9, 3, 5, 6, 3]
    assert SMALL.segments([2, 9, 3, 5, 6, 3]) == [0, 0, 0, 1, 1, 1]
    assert SMALL.segments([2, 9]) == [0, 0]
    with pytest.raises(ValueError, match="'\\[CLS\\]' is no special token"):
        WordPiece.from_tokens(["a", "[UNK]"]).with_cls_sep([0])


def test_decoding_puts_spaces_between_words_and_streams_the_same():
    ids = SMALL.with_cls_sep(SMALL.encode("Unaffable, the a's é"))
    assert SMALL.decode(ids) == "[CLS] unaffable, the a ' [UNK] [UNK] [SEP]"
    ids = [6, *SMALL.encode("the unaffable, a")]
    for tokenizer in (SMALL, WordPiece.from_tokens(LINES, text=CASED)):
        for length in range(len(ids) + 1):
            assert "".join(tokenizer.decode_stream(ids[:length])) == tokenizer.decode(ids[:length])
    assert SMALL.decode(ids) == "##aff the unaffable, a"
    assert SMALL.decode(np.array(ids)) == SMALL.decode(iter(ids)) == SMALL.decode(ids)


@pytest.mark.parametrize("ids", [[-1], [5, -1], [10**9], [5, 10**9]])
def test_ids_out_of_range_are_named(ids):
    with pytest.raises(ValueError, match=rf"{ids[-1]}: the vocabulary has size {len(LINES) + 4}"):
        SMALL.decode(ids)
    with pytest.raises(ValueError, match=f"{ids[-1]}"):
        list(SMALL.decode_stream(ids))


def test_long_texts_and_batches_give_the_ids_of_short_ones(monkeypatch):
    draw = random.Random(0)
    words = ["the", "unaffable", "x", "a" * 101, "a" * 40, "é", "漢漢", ",", "\u0301", "DON'T"]
    texts = [" ".join(draw.choices(words, k=draw.choice([0, 1, 20, 400]))) for _ in range(40)]
    expected = [[i for word in text.split() for i in SMALL.encode(word)] for text in texts]
    fresh = pickle.loads(pickle.dumps(SMALL))
    assert fresh.encode_batch(texts) == expected
    assert [fresh.encode(text) for text in texts] == expected
    assert [fresh.encode_array(text).tolist() for text in texts] == expected
    monkeypatch.setattr(wordpiece, "_SHORT_WORDS", 3)
    small = pickle.loads(pickle.dumps(SMALL))
    assert [[i for word in text.split() for i in small.encode(word)] for text in texts] == expected
    assert len(vars(small)["_known"]) <= 3
    assert SMALL.encode_batch([]) == []


def test_eight_threads_give_the_ids_of_one():
    draw = random.Random(1)
    texts = [
        " ".join("".join(draw.choices("athesé", k=draw.randint(1, 6))) for _ in range(size))
        for size in [5, 20, 500] * 40
    ]
    expected = [SMALL.encode(text) for text in texts]
    shared = pickle.loads(pickle.dumps(SMALL))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shared.encode, texts)) == expected


@pytest.mark.parametrize("letter", ["a", "é", "漢", "\u0301", "한", ",", "\U0001d16d", "x"])
def test_time_grows_with_the_length_of_a_word_and_no_more(letter):
    SMALL.encode(letter * 500)

    def seconds(size):
        start = time.process_time()
        SMALL.encode(letter * size)
        return time.process_time() - start

    assert seconds(200_000) < 1


def test_values_are_equal_when_their_fields_are():
    again = WordPiece.from_tokens([*LINES, "é", "##é", "don", "t"])
    assert again == SMALL
    assert hash(again) == hash(SMALL)
    SMALL.encode("the a " * 100)
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL
    assert WordPiece.from_tokens(LINES, text=CASED) != WordPiece.from_tokens(LINES)


# Files.


def test_a_vocabulary_is_one_token_to_a_line(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("[UNK]\r\na \n\n##b\u3000\n漢\n".encode())
    read = WordPiece.from_vocab_txt(path, text=CASED)
    assert read.tokens == (None, "a", None, "##b", "漢")
    assert read.special_tokens == {"[UNK]": 0}
    assert read.encode("ab 漢 AB") == [1, 3, 4, 0]
    assert read.to_vocab_txt().decode() == "[UNK]\na\n\n##b\n漢\n"
    assert WordPiece.from_tokens(SMALL.to_vocab_txt().decode().split("\n")[:-1]) == SMALL


def test_what_a_vocabulary_cannot_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match="Line 3 repeats the token 'a' of 1"):
        WordPiece.from_tokens(["a", "b", "a "])
    (tmp_path / "vocab.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab.txt is no UTF-8: line 2"):
        WordPiece.from_vocab_txt(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="cannot hold the token 0, 'a '"):
        WordPiece(tokens=("a ",), unknown=None).to_vocab_txt()
    with pytest.raises(ValueError, match="max_characters is at least 1, got 0"):
        WordPiece(tokens=("a",), unknown=None, max_characters=0)


@pytest.mark.parametrize(
    "tokenizer",
    [
        SMALL,
        WordPiece.from_tokens(LINES, text=BertText(strip_accents=False, clean=False)),
        WordPiece(tokens=("a", None, "@@b"), unknown=None, prefix="@@", max_characters=7),
        WordPiece(tokens=("a",), unknown="u", special_tokens={"u": 4}, cleanup=False),
    ],
)
def test_json_holds_the_whole_value(tokenizer, tokenizers):
    description = json.loads(json.dumps(tokenizer.to_json()))
    assert WordPiece.from_json(description) == tokenizer
    assert rust(tokenizers, tokenizer).encode("a", add_special_tokens=False).ids == (
        tokenizer.encode("a")
    )


def test_json_is_read_with_the_same_ids_or_refused():
    good = SMALL.to_json()

    def changed(part, **fields):
        return {**good, part: {**good[part], **fields}}

    for description, complaint in [
        ({**good, "pre_tokenizer": {"type": "Whitespace"}}, "BertPreTokenizer, .* 'Whitespace'"),
        ({**good, "normalizer": {"type": "NFC"}}, "BertNormalizer, here it is 'NFC'"),
        ({**good, "decoder": None}, "decoder of a WordPiece .* None"),
        (changed("decoder", prefix="@@"), "prefixes '##' and '@@' differ"),
        (changed("normalizer", strip_accents=1), "strip_accents is 1"),
        (changed("normalizer", lowercase=None), "normalizer.lowercase is missing"),
        (changed("model", max_input_chars_per_word=True), "max_input_chars_per_word is missing"),
        (changed("model", unk_token=3), "model.unk_token is missing or malformed: 3"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            WordPiece.from_json(description)
    assert WordPiece.from_json({**good, "added_tokens": []}).special_tokens == {"[UNK]": 1}
    raw = WordPiece.from_json({**good, "normalizer": None})
    assert raw.text == BertText(lowercase=False, clean=False, chinese=False)


# The published vocabulary and the Rust library.


def test_golden_ids_of_bert(bert, real_data, tmp_path):
    golden = json.loads((real_data / "vocab/golden_dev.json").read_text())
    for entry in golden:
        ids = bert.encode(entry["text"], allow_special=bert.special_tokens)
        assert bert.with_cls_sep(ids) == entry["bert-base-uncased"]
    path = tmp_path / "vocab.txt"
    path.write_bytes(
        gzip.decompress((real_data / "vocab/bert-base-uncased/vocab.txt.gz").read_bytes())
    )
    assert WordPiece.from_vocab_txt(path) == bert
    assert bert.to_vocab_txt() == path.read_bytes()


@pytest.mark.parametrize(
    "text", [BertText(), CASED, BertText(strip_accents=False), BertText(chinese=False, clean=False)]
)
def test_ids_are_those_of_the_rust_library_on_any_text(text, bert, tokenizers):
    draw = random.Random(str(text))
    ours = WordPiece(tokens=bert.tokens, special_tokens=bert.special_tokens, text=text)
    theirs = rust(tokenizers, ours)
    known = [token for token in bert.tokens if token]
    documents = []
    for _ in range(400):
        parts = draw.choices(known, k=draw.choice([1, 5, 60]))
        for i in range(0, len(parts), 2):
            wide = draw.choice([0x80, 0x300, 0x3000, 0xD000, 0x20000, 0x110000])
            code = draw.choice([c for c in draw.sample(range(wide), 3) if not 0xD800 <= c < 0xE000])
            parts[i] = draw.choice(["", " ", "é", "\u0323\u0301"]) + chr(code)
            parts[i] += draw.choice(["", "\U0001d16d", "a" * 99])
        documents.append("".join(parts))
    expected = [e.ids for e in theirs.encode_batch_fast(documents, add_special_tokens=False)]
    assert ours.encode_batch(documents) == expected
    assert [ours.encode(document) for document in documents] == expected
    for ids in expected[:100]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_ids_of_real_text_are_those_of_the_rust_library(bert, real_data, tokenizers):
    with lzma.open(real_data / "corpus/mixed_56mb.nul.xz") as file:
        documents = file.read(1_000_000).decode(errors="ignore").split("\0")
    theirs = rust(tokenizers, bert)
    encoded = theirs.encode_batch_fast(documents, add_special_tokens=False)
    assert bert.encode_batch(documents) == [each.ids for each in encoded]
    pair = theirs.encode("a b", "c")
    framed = bert.with_cls_sep(bert.encode("a b"), bert.encode("c"))
    assert (framed, bert.segments(framed)) == (pair.ids, pair.type_ids)
    drawn = np.random.default_rng(0).integers(0, bert.vocab_size, 3000)
    for cleanup in (True, False):
        ours = WordPiece(tokens=bert.tokens, special_tokens=bert.special_tokens, cleanup=cleanup)
        expected = rust(tokenizers, ours).decode(drawn.tolist(), skip_special_tokens=False)
        assert ours.decode(drawn) == expected
