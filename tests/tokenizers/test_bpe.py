"""Byte-level BPE: against a plain form, against the Rust tools, and against bad input."""

import os
import pickle
import random
import signal
import sys
import threading

import numpy as np
import pytest

from jaxformer.tokenizers import bpe, cutting, merging, patterns, word_ids, wordtable

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?\n\n"
    "    def f(x):\n        return x**2  # Größe\r\n"
    "Füße äöü naïve café, Привет, мир! こんにちは世界。使用HTTP协议。 مرحبا हिन्दी ❤️👍🏽 \t\u00a0 "
)


@pytest.fixture(scope="module", params=["GPT2", "CL100K", "CL100K_TIKTOKEN", "O200K"])
def tokenizer(request) -> bpe.Bpe:
    pattern = getattr(patterns, request.param)
    return bpe.train([TEXT * 3], vocab_size=420, special_tokens=["<|end|>"], pattern=pattern)


def documents(number: int, seed: int) -> list[str]:
    """Texts over all planes, of pieces of `TEXT`, and empty ones."""
    rng = random.Random(seed)
    spans = ((0x20, 0x7F), (0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))

    def document() -> str:
        parts = []
        for _ in range(rng.randrange(12)):
            start = rng.randrange(len(TEXT))
            parts.append(TEXT[start : start + rng.randrange(9)])
            parts.append(chr(rng.randrange(*rng.choice(spans))) * rng.choice([0, 0, 1, 1, 2, 9]))
        return "".join(parts)

    return [document() for _ in range(number)]


def plainly(tokenizer: bpe.Bpe, text: str) -> list[int]:
    """What encoding means: cut by the expression, merge each word by itself."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer.merges.tolist())}
    tokens = tokenizer.tokens
    results = [ids[tokens[left] + tokens[right]] for left, right in tokenizer.merges.tolist()]
    out = []
    for word in tokenizer.pattern.split(text):
        out += merging.merge([ids[bytes([byte])] for byte in word.encode()], ranks, results)
    return out


def test_short_long_and_batched_texts_get_the_ids_of_the_plain_form(tokenizer):
    texts = documents(120, seed=1)
    expected = [plainly(tokenizer, text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.encode_array(text).tolist() for text in texts] == expected
    assert tokenizer.encode_batch(texts) == expected
    ascii_texts = [text.encode("ascii", "ignore").decode() for text in texts]
    assert tokenizer.encode_batch(ascii_texts) == [plainly(tokenizer, t) for t in ascii_texts]


def test_ids_are_those_of_tiktoken(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if token is not None}
    regex = tokenizer.pattern.regex
    other = tiktoken.Encoding("test", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    texts = documents(1500, seed=2)
    assert tokenizer.encode_batch(texts) == [other.encode_ordinary(text) for text in texts]
    assert [tokenizer.encode(t) for t in texts] == [other.encode_ordinary(t) for t in texts]


def test_a_long_text_is_cut_only_where_a_word_surely_starts(tokenizer, monkeypatch):
    text = "".join(documents(100, seed=3))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(bpe, "_BLOCK", 50)
    assert len(list(cutting.blocks([text], 50, cutting.SAFE))) > 5
    assert tokenizer.encode(text) == whole
    assert tokenizer.encode_batch([text, "", "a", text, ""]) == [
        *(whole, [], tokenizer.encode("a"), whole, [])
    ]


def test_text_and_any_bytes_come_back(tokenizer):
    for text in documents(200, seed=4):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rng = random.Random(5)
    for _ in range(300):
        length = rng.randrange(20)
        data = bytes(rng.choices(b"a \xe2\x82\xac\xff\x80\n's\xf0\x9f\xed\xa0", k=length))
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.encode_bytes(TEXT.encode()) == tokenizer.encode(TEXT)


def test_lists_arrays_and_single_ids_decode_alike(tokenizer):
    ids = tokenizer.encode(TEXT * 4)
    for some in (ids, ids[:9], []):
        text = b"".join(tokenizer.token_bytes(i) for i in some)
        for form in (some, tuple(some), iter(some), np.array(some, int), np.array(some, np.uint16)):
            assert tokenizer.decode_bytes(form) == text


@pytest.mark.parametrize("number", [1, 400])
@pytest.mark.parametrize("bad", [-1, 420, 2**70])
def test_an_id_that_is_none_is_named(tokenizer, number, bad):
    ids = [5] * (number - 1) + [bad]
    with pytest.raises(ValueError, match=f"id {bad}: the vocabulary has size 420"):
        tokenizer.decode(ids)
    if number > 1 and bad < 2**60:
        with pytest.raises(ValueError, match=f"id {bad}: the vocabulary has size 420"):
            tokenizer.decode(np.array(ids))


def test_an_array_that_is_no_row_of_integers_is_refused(tokenizer):
    assert tokenizer.decode_bytes(np.zeros(0)) == b""
    with pytest.raises(ValueError, match=r"row of integers, got int64 of shape \(2, 3\)"):
        tokenizer.decode(np.zeros((2, 3), np.int64))


def test_an_unused_id_below_the_size_is_none():
    tokens = (*(bytes([i]) for i in range(256)), None, b"ab")
    tokenizer = bpe.Bpe(tokens=tokens, merges=np.array([[97, 98]]))
    assert tokenizer.decode([257]) == "ab"
    for ids in ([256], [97] * 300 + [256]):
        with pytest.raises(ValueError, match="id 256"):
            tokenizer.decode(ids)


def test_one_endless_word_takes_nearly_linear_time(tokenizer):
    rng = random.Random(6)
    for text in ("a" * 30_000, "".join(rng.choices("abcdeth", k=30_000)), "日" * 10_000):
        assert tokenizer.encode(text) == plainly(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode("lazy" * 500_000)) == "lazy" * 500_000


def test_merges_out_of_order_still_follow_the_plain_form():
    tokens = (*(bytes([i]) for i in range(256)), b"ab", b"abc", b"bc", b"cab")
    merges = np.array([[256, 99], [98, 99], [97, 98], [97, 258], [99, 256]])
    tokenizer = bpe.Bpe(tokens=tokens, merges=merges)
    rng = random.Random(7)
    for length in (5, 50, 400):
        text = "".join(rng.choices("abc", k=length))
        assert tokenizer.encode(text) == plainly(tokenizer, text)


def test_whole_words_become_their_token_whatever_the_merges_say():
    tokens = (*(bytes([i]) for i in range(256)), b"abc", b" a long word that no merge will make")
    tokenizer = bpe.Bpe(
        tokens=tokens, merges=np.zeros((0, 2)), pattern=patterns.Pattern(" [^!]+"), whole_words=True
    )
    text = "abc a long word that no merge will make!abcd"
    assert tokenizer.encode(text) == [256, 257, *b"!abcd"]
    tokenizer = bpe.Bpe(tokens=tokens, merges=np.zeros((0, 2)), whole_words=True)
    assert tokenizer.encode("abc,abcd" * 100)[:6] == [256, 44, *b"abcd"]


def test_a_byte_without_token_is_named():
    tokenizer = bpe.Bpe(tokens=(b"a", b"b"), merges=np.zeros((0, 2)))
    assert tokenizer.encode("abba") == [0, 1, 1, 0]
    for text in ("abc", "abc" * 200):
        with pytest.raises(ValueError, match="byte 0x63"):
            tokenizer.encode(text)
    assert tokenizer.encode("abba") == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (b"a", b"b", b"a")}, "0 and 2 are both b'a'"),
        ({"tokens": (b"a", b"")}, "token 1 is empty"),
        ({"merges": np.array([[0, 2]])}, "outside 0 to 1"),
        ({"merges": np.array([[0, 1]])}, "Merge 0, b'a' with b'b', gives no token"),
        ({"merges": np.array([[0, 1], [0, 1]])}, "0 with 1 is there twice"),
        ({"merges": np.array([[0.5, 1.0]])}, "pairs of integers, got float64"),
        ({"special_tokens": {"<s>": 10**13}}, "'<s>' has the id 10000000000000; ids are"),
        ({"special_tokens": {"<s>": True}}, "'<s>' has the id True"),
        ({"special_tokens": {"\ud800": 5}}, "lone surrogate"),
        ({"special_tokens": {"<s>": 1}}, "'<s>' has the id 1, which is not free"),
        ({"special_tokens": {"<s>": 5, "</s>": 5}}, "'</s>' has the id 5"),
    ],
)
def test_a_contradiction_is_refused(change, message):
    fields = {"tokens": (b"a", b"b"), "merges": np.zeros((0, 2)), **change}
    with pytest.raises(ValueError, match=message):
        bpe.Bpe(**fields)


def test_a_bound_holds_what_is_remembered(tokenizer, monkeypatch):
    texts = documents(60, seed=8)
    expected = [plainly(tokenizer, text) for text in texts]
    monkeypatch.setattr(word_ids, "_WORDS", 20)
    monkeypatch.setattr(bpe, "_SHORT_WORDS", 20)
    fresh = pickle.loads(pickle.dumps(tokenizer))
    assert [fresh.encode_array(text).tolist() for text in texts] == expected
    assert [fresh.encode(text) for text in texts] == expected
    assert all(table.size <= 20 for table in fresh._engine.words._idle)
    assert len(fresh._known) <= 20 + max(len(text) for text in texts)


def test_what_is_remembered_is_no_part_of_the_value(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    before = pickle.dumps(copy)
    assert copy.encode(TEXT * 9) == tokenizer.encode(TEXT * 9)
    assert copy.encode(TEXT[:50]) == tokenizer.encode(TEXT[:50])
    assert copy._engine.words._idle
    assert copy._known
    assert pickle.dumps(copy) == before
    assert copy == tokenizer
    assert tokenizer != tokenizer.truncate(400)


def test_an_interrupt_in_the_middle_leaves_a_sound_tokenizer(tokenizer, monkeypatch):
    texts = documents(40, seed=9)
    expected = tokenizer.encode_batch(texts)
    fresh = pickle.loads(pickle.dumps(tokenizer))

    def interrupted(*_):
        raise KeyboardInterrupt

    for part, place in ((word_ids._Table, "_store"), (wordtable.WordTable, "spelling")):
        with monkeypatch.context() as patch:
            patch.setattr(part, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                fresh.encode_batch(["new words each time " + place * 3])
        assert fresh.encode_batch(texts) == expected


def test_eight_threads_get_the_ids_of_one(tokenizer):
    texts = documents(160, seed=10)
    expected = [plainly(tokenizer, text) for text in texts]
    fresh = pickle.loads(pickle.dumps(tokenizer))
    found = {}

    def work(thread: int) -> None:
        order = random.Random(thread).sample(range(len(texts)), len(texts))
        ids = {}
        for i in order:
            ids[i] = fresh.encode(texts[i])
            assert fresh.encode_array(texts[i]).tolist() == ids[i]
        found[thread] = [ids[i] for i in range(len(texts))]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert list(found.values()) == [expected] * 8
    assert len(fresh._engine.words._idle) <= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_while_another_thread_encodes_neither_hangs_nor_errs(tokenizer):
    texts = documents(50, seed=11)
    expected = tokenizer.encode_batch(texts)
    stop = threading.Event()

    def busy() -> None:
        i = 0
        while not stop.is_set():
            tokenizer.encode_array(f"word{i} " * 50)
            i += 1

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(3):
            child = os.fork()
            if not child:
                signal.alarm(20)  # a hang ends the child with a signal
                os._exit(0 if tokenizer.encode_batch(texts) == expected else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_words_made_to_collide_under_one_hash_do_not_under_another(tokenizer):
    tables = [wordtable.WordTable() for _ in range(2)]
    assert tables[0]._mix != tables[1]._mix
    assert tables[0]._mix_length != tables[1]._mix_length
    assert all(int(table._mix) % 2 for table in tables)
