"""The contract, for every kind of tokenizer: a new kind is one more entry of `KINDS`."""

import concurrent.futures
import copy
import dataclasses
import functools
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from jaxformer.tokenizers import (
    alphabets,
    bpe,
    char_bpe,
    formats,
    kmers,
    patterns,
    plain,
    wordpiece,
    wordpiece_training,
)
from jaxformer.tokenizers import tokenizer as tokenizer_module
from jaxformer.tokenizers.tokenizer import Span, Tokenizer

SHORT, LONG = "<|end|>", "<|end|>of"  # the longer begins with the shorter
SPECIALS = (SHORT, LONG)
PROSE = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\nand\tlines \r\n",
    "naïve Größe, 你好, привет, 🙂👩‍👩‍👧, e\u0301",
    "1234567 3.14159 x=1",
    "a" * 300,
    " ".join(f"word{i}" for i in range(200)),
)
BASES = ("", "A", "ACGT", "NNACGTNRYACGTACGTAC-.T", "ACG" * 200, "N", "AC")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to make a tokenizer with the two special tokens, and texts that it takes.

    `lossless` says whether the texts come back.
    """

    make: Callable[[], Tokenizer]
    texts: tuple[str, ...] = PROSE
    lossless: bool = True


def trained(kind):
    return kind.train(PROSE, special_tokens=SPECIALS)


def dna(**options):
    return alphabets.dna(special_tokens=SPECIALS, **options)


KINDS = {
    "bytes": Kind(lambda: plain.Bytes(special_tokens={SHORT: 256, LONG: 257})),
    "characters": Kind(lambda: trained(plain.Characters)),
    "words": Kind(lambda: trained(plain.Words)),
    "byte-level BPE": Kind(
        lambda: bpe.train(PROSE, vocab_size=400, special_tokens=SPECIALS, pattern=patterns.CL100K)
    ),
    "BPE of characters": Kind(
        lambda: char_bpe.train(
            PROSE, vocab_size=200, special_tokens=[*SPECIALS, "<unk>"], unknown="<unk>"
        ),
        lossless=False,
    ),
    "WordPiece": Kind(
        lambda: wordpiece_training.train(
            PROSE,
            vocab_size=200,
            special_tokens=[*wordpiece.SPECIAL_TOKENS, *SPECIALS],
            min_frequency=1,
        ),
        lossless=False,
    ),
    "dna": Kind(dna, BASES),
    "dna, lower case kept": Kind(lambda: dna(lower="keep"), (*BASES, "ACGTacgtnN-")),
    "4-mers": Kind(lambda: kmers.kmers(dna(), 4, letters="ACGT"), BASES),
    "3-mers, overlapping": Kind(lambda: kmers.kmers(dna(), 3, letters="ACGT", overlap=True), BASES),
}


@functools.cache
def shared(name):
    return KINDS[name].make()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def tokenizer(request, kind):
    return shared(next(name for name, other in KINDS.items() if other is kind))


def own_text(kind, length, seed=0):
    """A text of the kind's own words in another order."""
    between = " " if kind.texts is PROSE else ""
    return between.join(
        random.Random(seed).choices([text for text in kind.texts if text], k=length)
    )


def test_decoding_undoes_encoding(tokenizer, kind):
    for text in kind.texts:
        ids = tokenizer.encode(text)
        assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
        if kind.lossless:
            assert tokenizer.decode(ids) == text


def test_every_way_to_decode_gives_the_same_text(tokenizer, kind):
    for text in kind.texts:
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        assert tokenizer.decode_bytes(ids) == decoded.encode()
        for dtype in (np.int32, np.int64, np.uint16):
            assert tokenizer.decode(np.array(ids, dtype)) == decoded
        assert tokenizer.decode(iter(ids)) == tokenizer.decode(tuple(ids)) == decoded
        assert tokenizer.decode([np.int32(token) for token in ids]) == decoded


def test_every_way_to_encode_gives_the_same_ids(tokenizer, kind):
    expected = [tokenizer.encode(text) for text in kind.texts]
    assert tokenizer.encode_batch(kind.texts) == expected
    assert tokenizer.encode_batch(kind.texts, allow_special=SPECIALS) == expected
    assert [tokenizer.encode_bytes(text.encode()) for text in kind.texts] == expected
    for text, ids in zip(kind.texts, expected):
        array = tokenizer.encode_array(text)
        assert array.dtype == np.int32
        assert array.tolist() == ids
    assert tokenizer.encode_batch([]) == []


def test_padded_arrays_hold_the_ids_and_their_lengths(tokenizer, kind):
    expected = [tokenizer.encode(text) for text in kind.texts]
    longest = max(map(len, expected))
    for length in (None, 0, 3, longest + 5):
        ids, lengths = tokenizer.encode_padded(kind.texts, pad=-7, length=length)
        columns = longest if length is None else length
        assert ids.shape == (len(kind.texts), columns)
        assert ids.dtype == lengths.dtype == np.int32
        for row, n, tokens in zip(ids, lengths, expected):
            assert row[:n].tolist() == tokens[:columns]
            assert (row[n:] == -7).all()
    empty, lengths = tokenizer.encode_padded([], pad=0)
    assert empty.shape == (0, 0)
    assert lengths.shape == (0,)
    with pytest.raises(ValueError, match="-1"):
        tokenizer.encode_padded(kind.texts, pad=0, length=-1)


def test_a_stream_gives_whole_characters_that_join_to_the_text(tokenizer, kind):
    for text in kind.texts:
        ids = tokenizer.encode(text)
        pieces = list(tokenizer.decode_stream(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)
    special = tokenizer.special_tokens[LONG]
    assert "".join(tokenizer.decode_stream([special])) == LONG


@pytest.mark.parametrize("name", ["bytes", "byte-level BPE"])
def test_a_stream_that_ends_within_a_character_shows_it_at_the_end(name):
    ids = shared(name).encode_bytes("aé".encode()[:-1])
    assert list(shared(name).decode_stream(ids))[-1] == "\ufffd"
    assert "".join(shared(name).decode_stream(ids)) == shared(name).decode(ids) == "a\ufffd"


@pytest.mark.parametrize("name", ["bytes", "byte-level BPE"])
def test_tokenizers_of_bytes_take_any_bytes(name):
    for seed in range(50):
        data = random.Random(seed).randbytes(seed)
        assert shared(name).decode_bytes(shared(name).encode_bytes(data)) == data


def test_a_stream_gives_what_it_can_at_once(tokenizer, kind):
    """Before the next id is taken, all is given but the beginning of a character."""
    for text in kind.texts:
        ids, given, taken = tokenizer.encode(text), "", []

        def one_by_one(ids=ids, taken=taken):
            for token in ids:
                taken.append(token)
                yield token

        for piece in tokenizer.decode_stream(one_by_one()):
            given += piece
            known = tokenizer.decode_bytes(taken).decode("utf-8", "ignore")
            assert known.rstrip(" ").startswith(given.rstrip(" "))
            assert len(known) - len(given) <= (0 if kind.lossless else len(LONG))


def test_ids_that_are_none_are_named_with_the_vocabulary_size(tokenizer):
    size = tokenizer.vocab_size
    good = tokenizer.special_tokens[SHORT]
    for bad in (-1, size, size + 10**6, 10**30, -(10**30)):
        for ids in ([bad], [good, bad, good]):
            with pytest.raises(ValueError, match=rf"id {bad}: .* size {size}\b"):
                tokenizer.decode_bytes(ids)
            with pytest.raises(ValueError, match=rf"id {bad}: .* size {size}\b"):
                list(tokenizer.decode_stream(ids))
    with pytest.raises(ValueError, match=rf"id {size}: .* size {size}\b"):
        tokenizer.decode(np.array([size]))


def ids_of_plain(encode, text):
    """The ids of text that an alphabet may refuse: then it is for the text's own characters."""
    try:
        return set(encode(text))
    except ValueError as error:
        if "'<' (U+003C)" not in str(error):
            raise
        return set()


def test_text_never_becomes_a_special_token_unless_allowed(tokenizer, kind):
    special = set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id}
    sample = kind.texts[3]
    for text in (SHORT, LONG, f"{sample}{LONG}{sample}", SHORT * 3):
        assert not special & ids_of_plain(tokenizer.encode, text)
        assert not special & ids_of_plain(lambda x: tokenizer.encode_batch([x, x])[1], text)
        assert not special & ids_of_plain(lambda x: tokenizer.encode_array(x).tolist(), text)
        assert not special & ids_of_plain(lambda x: tokenizer.encode_bytes(x.encode()), text)
        assert not special & ids_of_plain(
            lambda x: tokenizer.encode_padded([x], pad=-1)[0][0], text
        )


def test_allowed_special_tokens_are_found_the_longest_first(tokenizer, kind):
    short, long = (tokenizer.special_tokens[name] for name in SPECIALS)
    left, right = kind.texts[3], kind.texts[2]
    both = tokenizer.encode(f"{left}{LONG}{right}{SHORT}", allow_special=SPECIALS)
    assert both == [*tokenizer.encode(left), long, *tokenizer.encode(right), short]
    if kind.lossless:
        assert tokenizer.decode(both) == f"{left}{LONG}{right}{SHORT}"
    assert tokenizer.encode_batch([LONG, left], allow_special={LONG, SHORT})[0] == [long]
    assert tokenizer.encode(SHORT, allow_special=[SHORT]) == [short]
    assert tokenizer.encode(SHORT * 2, allow_special=[LONG, SHORT]) == [short] * 2


def test_unknown_special_names_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'<none>' is no special token"):
        tokenizer.encode("", allow_special=["<none>"])
    with pytest.raises(ValueError, match="collection"):
        tokenizer.encode("", allow_special=SHORT)


def test_spans_read_special_tokens_in_trusted_text_only(tokenizer, kind):
    text = kind.texts[3]
    short = tokenizer.special_tokens[SHORT]
    ids = tokenizer.encode_spans([Span(SHORT, trusted=True), text, (text, False), (SHORT, True)])
    assert ids == [short, *tokenizer.encode(text) * 2, short]
    assert short not in ids_of_plain(lambda x: tokenizer.encode_spans([x, (x, False)]), SHORT)


def test_lone_surrogates_and_invalid_bytes_are_refused_by_place(tokenizer, kind):
    with pytest.raises(ValueError, match=r"U\+DC80 at character 2"):
        tokenizer.encode("AC\udc80")
    with pytest.raises(ValueError, match=r"U\+D800"):
        tokenizer.encode_batch(["AC", "\ud800"])
    if not isinstance(tokenizer, plain.Bytes) and kind.texts is not PROSE:
        with pytest.raises(ValueError, match="line 2, byte 3"):
            tokenizer.encode_bytes(b"A\nC\xff")


def test_a_copy_is_equal_and_caches_are_no_part_of_the_value(kind):
    tokenizer, fresh = kind.make(), kind.make()
    tokenizer.encode_batch(kind.texts)
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), fresh):
        assert other == tokenizer
        assert hash(other) == hash(tokenizer)
        assert other.encode_batch(kind.texts) == tokenizer.encode_batch(kind.texts)
    assert len(pickle.dumps(tokenizer)) == len(pickle.dumps(kind.make()))
    assert str(tokenizer.vocab_size) in repr(tokenizer)
    assert len(repr(tokenizer)) < 200


def test_every_field_counts_in_equality(kind):
    tokenizer = kind.make()
    state = tokenizer.__getstate__()
    fewer = {name: token for name, token in tokenizer.special_tokens.items() if name != LONG}
    assert type(tokenizer)(**{**state, "special_tokens": fewer}) != tokenizer
    assert tokenizer != "text"
    assert all(other.make() != tokenizer or other is kind for other in KINDS.values())


def test_a_tokenizer_cannot_be_changed(tokenizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokenizer.special_tokens = {}
    with pytest.raises(TypeError):
        tokenizer.special_tokens["x"] = 1


def test_a_file_holds_the_whole_value(tokenizer, kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = formats.load(path)
    assert loaded == tokenizer
    assert type(tokenizer).load(path) == tokenizer
    assert loaded.encode_batch(kind.texts) == tokenizer.encode_batch(kind.texts)


def test_loading_another_kind_is_refused(tmp_path):
    plain.Bytes().save(tmp_path / "x.json")
    with pytest.raises(ValueError, match="holds a Bytes, not a Words"):
        plain.Words.load(tmp_path / "x.json")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_alone(failing, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    plain.Bytes().save(path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer_module.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        trained(plain.Words).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def test_a_killed_save_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "tokenizer.json"
    plain.Bytes().save(path)
    old = path.read_bytes()
    program = (
        "import os, signal, sys\n"
        "from jaxformer.tokenizers import plain\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "plain.Characters.train(['x' * 100]).save(sys.argv[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, path])
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == old


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_text("")
    plain.Bytes().save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "new").chmod(0o600)
    plain.Bytes().save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_eight_threads_sharing_one_tokenizer_give_its_ids(kind):
    texts = [own_text(kind, 8, seed) for seed in range(8)]
    warm, cold = kind.make(), kind.make()
    expected = [warm.encode(text) for text in texts]
    decoded = [warm.decode(ids) for ids in expected]

    def work(seed):
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        for i in order:
            assert cold.encode(texts[i]) == expected[i]
            assert cold.encode_array(texts[i]).tolist() == expected[i]
            assert cold.decode(expected[i]) == decoded[i]
        assert cold.encode_batch(texts) == expected

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


FORKING = """
import os, pickle, signal, sys, threading
cases = pickle.load(sys.stdin.buffer)
stop = threading.Event()
def encode():
    while not stop.is_set():
        for tokenizer, texts, _ in cases:
            tokenizer.encode_batch(texts)
threads = [threading.Thread(target=encode) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if not child:
        signal.alarm(10)
        ok = all(t.encode_batch(texts) == expected for t, texts, expected in cases)
        os._exit(0 if ok else 1)
    status = os.waitpid(child, 0)[1]
    if status:
        break
stop.set()
for thread in threads:
    thread.join()
sys.exit(status != 0)
"""


def test_a_process_forked_while_threads_encode_gives_the_same_ids():
    cases = []
    for name, kind in KINDS.items():
        texts = [own_text(kind, 3, seed) for seed in range(4)]
        cases.append((kind.make(), texts, shared(name).encode_batch(texts)))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], input=pickle.dumps(cases), timeout=60
    )
    assert result.returncode == 0


def test_tokenizers_import_no_jax():
    program = (
        "import sys\n"
        "from jaxformer.tokenizers import formats\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Array:
    """What other libraries' arrays have in common."""

    def __array__(self, dtype=None, copy=None):
        return np.array([1, 2, 1], np.int64)

    def __iter__(self):
        raise AssertionError


def test_ids_may_come_in_the_array_of_another_library(tokenizer):
    assert tokenizer.decode_bytes(Array()) == tokenizer.decode_bytes([1, 2, 1])


def test_one_string_is_not_taken_for_a_batch_or_a_chat(tokenizer):
    for encode in (tokenizer.encode_batch, tokenizer.encode_spans):
        with pytest.raises(ValueError, match="got one string"):
            encode("acg")
    with pytest.raises(ValueError, match="got one string"):
        tokenizer.encode_padded("acg", pad=0)


def test_a_span_is_trusted_by_true_alone(tokenizer):
    name = next(iter(tokenizer.special_tokens))
    for span in ((name, "no"), ("user", name), (name, 1)):
        with pytest.raises(ValueError, match="A span is a text and True or False"):
            tokenizer.encode_spans([span])


def test_saving_follows_links_and_writes_to_what_is_no_file(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    plain.Bytes().save(link)
    assert link.is_symlink()
    assert target.read_text().startswith("{")
    plain.Bytes().save("/dev/null")
    assert not pathlib.Path("/dev/null").is_file()
    with pytest.raises(FileNotFoundError, match="missing/new"):
        plain.Bytes().save(tmp_path / "missing" / "new")
