"""Files: which format it is, that every format comes back, and that nothing malformed passes."""

import gzip
import json
import os
import random

import pytest

from jaxformer.tokenizers import (
    alphabets,
    bpe,
    char_bpe,
    formats,
    gpt2_files,
    kmers,
    patterns,
    plain,
)
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.sentencepiece import Kind, Piece, SentencePieceBpe
from jaxformer.tokenizers.wordpiece import WordPiece

LINES = ["low lower lowest, newer newest wide wider widest"] * 3
ACROSS = tuple(Piece(text, -float(i), Kind.NORMAL) for i, text in enumerate(("lo", "low", "▁low")))
LETTERS = tuple(Piece(text, -3.0 - i, Kind.NORMAL) for i, text in enumerate("▁lowernstid,"))


def byte_level() -> bpe.Bpe:
    return bpe.train(LINES, vocab_size=280, special_tokens=["<|end|>"])


def ranked() -> bpe.Bpe:
    return bpe.train(LINES, vocab_size=280)


def pieces() -> SentencePieceBpe:
    head = (Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL))
    return SentencePieceBpe(pieces=(*head, *ACROSS, *LETTERS), byte_fallback=False, bos=1)


def word_pieces() -> WordPiece:
    return WordPiece.from_tokens(["[PAD]", "[UNK]", "low", "##er", "new"])


KINDS = {
    "bytes": lambda: plain.Bytes(special_tokens={"<s>": 256}),
    "characters": lambda: plain.Characters.train(LINES),
    "words": lambda: plain.Words.train(LINES),
    "protein": alphabets.protein,
    "kmers": lambda: kmers.kmers(alphabets.dna(), 3, letters="ACGT"),
    "byte-level BPE": byte_level,
    "WordPiece": word_pieces,
    "character BPE": lambda: char_bpe.train(LINES, vocab_size=40, unknown="<unk>"),
    "SentencePiece": pieces,
}
FILES = {
    "tokenizer.json": ("hf", byte_level),
    "x.json": ("json", pieces),
    "llama.json": ("hf", pieces),
    "characters.json": ("hf", KINDS["character BPE"]),
    "x.tiktoken": ("tiktoken", ranked),
    "x.model": ("sentencepiece", pieces),
    "bert.txt": ("bert", word_pieces),
    "bert.json": ("hf", word_pieces),
    "vocab.txt": ("bert", lambda: alphabets.protein(unknown="<unk>")),
}


def options(name):
    return {"pattern": patterns.GPT2} if ".tiktoken" in name else {}


def outcome(path):
    """What the file holds, or None if it is refused by its name; no other error may come."""
    try:
        return formats.load(path, **options(path.name))
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_what_any_tokenizer_saves_is_loaded_as_an_equal_value(make, tmp_path):
    tokenizer = make()
    for name in ("a file", "tokenizer.json", "x.json.gz"):
        formats.save(tokenizer, tmp_path / name, format="json")
        assert formats.load(tmp_path / name) == tokenizer
    tokenizer.save(tmp_path / "b")
    assert type(tokenizer).load(tmp_path / "b") == tokenizer
    other = plain.Words if not isinstance(tokenizer, plain.Words) else plain.Bytes
    with pytest.raises(ValueError, match=f"not a {other.__name__}"):
        other.load(tmp_path / "b")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_is_told_by_name_or_content(name, ending, tmp_path):
    format, make = FILES[name]
    path = tmp_path / (name + ending)
    formats.save(make(), path, format=format)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(ending)
    assert formats.load(path, **options(name)) == make()
    if format not in ("hf", "json") and name != "bert.txt":
        path.unlink()
        formats.save(make(), path)  # the name alone says which
        assert formats.load(path, **options(name)) == make()


def test_gpt2_is_a_folder_or_either_of_its_files_with_the_other_beside(tmp_path):
    tokenizer = byte_level()
    formats.save(tokenizer, tmp_path / "folder")
    names = ("", "vocab.json", "merges.txt")
    assert [formats.load(tmp_path / "folder" / name) for name in names] == [tokenizer] * 3
    old = tmp_path / "old"
    old.mkdir()
    for new, name in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        data = (tmp_path / "folder" / new).read_bytes()
        (old / f"{name}.gz").write_bytes(gzip.compress(data))
    assert formats.load(old) == tokenizer
    (old / "encoder.json.gz").unlink()
    with pytest.raises(ValueError, match=r"no vocab.json or encoder.json beside it"):
        formats.load(old / "vocab.bpe.gz")


def test_gpt2_files_take_the_pattern_and_special_tokens_that_are_given(tmp_path):
    tokenizer = bpe.train(LINES, vocab_size=280, pattern=patterns.O200K)
    formats.save(tokenizer, tmp_path / "folder")
    assert formats.load(tmp_path / "folder", pattern=patterns.O200K) == tokenizer
    loaded = formats.load(tmp_path / "folder", special_tokens={"<s>": 280})
    assert loaded.special_tokens == {"<s>": 280}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"])
def test_a_folder_is_read_by_what_it_holds(name, tmp_path):
    make = {"tokenizer.model": pieces, "vocab.txt": FILES["vocab.txt"][1]}.get(name, byte_level)
    formats.save(make(), tmp_path if name == "merges.txt" else tmp_path / name)
    assert formats.load(tmp_path) == make()


def test_published_ranks_bring_their_pattern_and_others_need_one(tmp_path):
    formats.save(ranked(), tmp_path / "own.tiktoken")
    with pytest.raises(ValueError, match="give the pattern"):
        formats.load(tmp_path / "own.tiktoken")
    os.rename(tmp_path / "own.tiktoken", tmp_path / "r50k_base.tiktoken")
    loaded = formats.load(tmp_path / "r50k_base.tiktoken")
    assert loaded.special_tokens == {"<|endoftext|>": 50256}
    assert loaded.pattern == patterns.GPT2
    given = formats.load(tmp_path / "r50k_base.tiktoken", special_tokens={}, pattern=patterns.O200K)
    assert (given.special_tokens, given.pattern) == ({}, patterns.O200K)


@pytest.mark.parametrize("name", ["<s>", "[CLS]", "<|a b|>"])
def test_special_tokens_of_gpt2_files_are_told_by_their_brackets(name, tmp_path):
    tokenizer = bpe.train(LINES, vocab_size=280, special_tokens=[name])
    formats.save(tokenizer, tmp_path / "folder")
    assert formats.load(tmp_path / "folder") == tokenizer


def test_options_for_a_file_that_has_its_own_are_refused(tmp_path):
    byte_level().save(tmp_path / "x.json")
    with pytest.raises(ValueError, match="pattern and special_tokens are for"):
        formats.load(tmp_path / "x.json", pattern=patterns.GPT2)


@pytest.mark.parametrize(
    ("format", "make", "message"),
    [
        ("sentencepiece", byte_level, "'sentencepiece' cannot hold a Bpe"),
        ("gpt2", pieces, "'gpt2' cannot hold a SentencePieceBpe"),
        ("tiktoken", pieces, "'tiktoken' cannot hold"),
        ("hf", KINDS["words"], "cannot hold a Words"),
        ("bert", byte_level, "cannot hold a Bpe"),
        ("yaml", byte_level, "one of json, hf, gpt2, tiktoken, bert, sentencepiece, got 'yaml'"),
    ],
)
def test_a_format_that_cannot_hold_the_tokenizer_is_refused_and_writes_nothing(
    format, make, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        formats.save(make(), tmp_path / "x", format=format)
    assert not list(tmp_path.iterdir())


def test_what_would_not_be_saved_is_known_without_writing(tmp_path):
    formats.check(byte_level(), tmp_path / "folder")
    with pytest.raises(ValueError, match="'tiktoken' cannot hold a Words"):
        formats.check(plain.Words.train(LINES), tmp_path / "x.tiktoken")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="need a folder"):
        formats.save(byte_level(), tmp_path / "file")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_by_name_or_is_a_whole_file_itself(name, tmp_path):
    format, make = FILES[name]
    path = tmp_path / name
    formats.save(make(), path, format=format)
    data = path.read_bytes()
    rng = random.Random(0)
    for size in {0, 1, len(data) // 2, len(data) - 1, *rng.choices(range(len(data)), k=40)}:
        path.write_bytes(data[:size])
        if (loaded := outcome(path)) is not None:
            assert format in ("tiktoken", "sentencepiece", "bert")
            assert loaded.vocab_size <= make().vocab_size


@pytest.mark.parametrize("name", FILES)
def test_no_change_of_bytes_gives_another_error_than_one_that_names_the_file(name, tmp_path):
    format, make = FILES[name]
    path = tmp_path / name
    formats.save(make(), path, format=format)
    data = path.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            changed[at : at + rng.randrange(3)] = rng.choices(
                b'"{}[]:, 0-\n\xffa', k=rng.randrange(3)
            )
        path.write_bytes(changed)
        outcome(path)


def test_json_of_any_shape_is_refused_by_name(tmp_path):
    parts = json.loads(json.dumps(byte_level().to_json()))
    path = tmp_path / "tokenizer.json"
    junk = (None, 7, "x", [], {}, [[]], [{}], {"type": 5}, {"type": "Sequence"}, True)
    for holder, keys in ((parts, list(parts)), (parts["model"], list(parts["model"]))):
        for key in keys:
            kept = holder[key]
            for value in junk:
                holder[key] = value
                path.write_text(json.dumps(parts))
                outcome(path)
            holder[key] = kept
    path.write_text(json.dumps(parts))
    assert formats.load(path) == byte_level()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b"", "the file is empty"),
        ("x.json", b" \n", "the file is empty"),
        ("x.json", b'{"model": ', "malformed JSON.*line 1"),
        ("x.json", b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("x.json", b'{"a": \xff}', "no UTF-8: line 1"),
        ("x.json", b'{"a":' * 100_000, "malformed JSON"),
        ("x.json", b'{"the": 1}', "model is missing"),
        ("x.json", b'{"model": {"type": "Unigram"}}', "'Unigram' is not supported"),
        ("x.json", b'{"jaxformer": "other"}', "no tokenizer of the kind 'other'"),
        ("x.json", b'{"jaxformer": []}', "x.json"),
        ("x.json", b'{"jaxformer": "words"}', "misses"),
        ("x.json", b'{"jaxformer": "sentencepiece"}', "pieces"),
        ("x.json.gz", b"\x1f\x8b\x08\0", "damaged"),
        ("x.bin", b"\x7fELF", "no format that can be read"),
        ("x.model", b"\x7fELF", "no SentencePiece model"),
        ("vocab.txt", b"[UNK]\nb\n[UNK]\n", "ine 3 .*UNK"),
        ("vocab.txt", b"a\nb\n", r"no line \[UNK\]"),
        ("vocab.txt", b"\xff\n", "no UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_what_is_wrong(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        formats.load(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (b"#version: 0.2\nl o\nl  o\n", "line 3 of the merges is no pair"),
        (b"l o\nlo\n", "line 2 of the merges is no pair"),
        (b"l o\n\nlo w\n", "line 2 of the merges is no pair"),
        (b"l o\nlo w\nl o\n", "line 3 of the merges is line 1 again"),
        (b"l q\n", "needs the token 'lq'"),
        (b"l \xff\n", "merges is no UTF-8"),
    ],
)
def test_a_malformed_list_of_merges_is_named_with_its_line(merges, message, tmp_path):
    formats.save(ranked(), tmp_path / "folder")
    (tmp_path / "folder/merges.txt").write_bytes(merges)
    with pytest.raises(ValueError, match=message):
        formats.load(tmp_path / "folder", special_tokens={})


def test_a_vocabulary_beside_an_older_list_of_merges_is_refused(tmp_path):
    formats.save(byte_level(), tmp_path / "folder")
    path = tmp_path / "folder/merges.txt"
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1].decode().replace(" ", "").strip()
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=f"no merge makes the token '{last}': the two files"):
        formats.load(tmp_path / "folder")
    special = {"<|end|>": byte_level().special_tokens["<|end|>"]}
    assert formats.load(tmp_path / "folder", special_tokens=special).special_tokens == special


def test_merges_may_end_with_carriage_returns_or_without_a_line_end(tmp_path):
    formats.save(ranked(), tmp_path / "folder")
    path = tmp_path / "folder/merges.txt"
    lines = path.read_bytes()
    for changed in (lines.replace(b"\n", b"\r\n"), lines[:-1], lines.split(b"\n", 1)[1]):
        path.write_bytes(changed)
        assert formats.load(path) == ranked()


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        formats.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="holds none of"):
        formats.load(tmp_path)


def test_a_failing_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.tiktoken"
    formats.save(ranked(), path)
    old = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        formats.save(ranked(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_gpt2_and_its_ranks_are_one_value(real_data):
    golden = json.loads((real_data / "vocab/golden_dev.json").read_text())
    tokenizer = formats.load(real_data / "vocab/gpt2")
    assert tokenizer == formats.load(real_data / "vocab/tiktoken/r50k_base.tiktoken.gz")
    for entry in golden:
        assert tokenizer.encode(entry["text"]) == entry["gpt2"]
        assert tokenizer.decode(entry["gpt2"]) == entry["text"]
    vocab, merges = gpt2_files.serialize(tokenizer)
    assert gpt2_files.parse(json.loads(vocab), merges) == tokenizer


def test_esm_is_its_alphabet(real_data):
    assert formats.load(real_data / "vocab/esm/vocab.txt") == alphabets.protein(unknown="<unk>")


def test_bert_is_one_value_from_both_its_files_and_gives_the_golden_ids(real_data, tmp_path):
    folder = real_data / "vocab/bert-base-uncased"
    tokenizer = formats.load(folder / "vocab.txt.gz")
    assert tokenizer == formats.load(folder / "tokenizer.json.gz")
    golden = json.loads((real_data / "vocab/golden_dev.json").read_text())
    specials = tokenizer.special_tokens
    for entry in golden:
        ids = tokenizer.encode(entry["text"], allow_special=specials)
        assert [specials["[CLS]"], *ids, specials["[SEP]"]] == entry["bert-base-uncased"]
    for name in ("vocab.txt.gz", "tokenizer.json"):
        formats.save(tokenizer, tmp_path / name)
        assert formats.load(tmp_path / name) == tokenizer
    cased = formats.load(folder / "vocab.txt.gz", text=BertText(lowercase=False))
    assert cased.encode("Hello") != tokenizer.encode("Hello")
