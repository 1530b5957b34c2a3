"""`tokenizer.json` of byte-level BPE: the same ids in both libraries, and what is refused."""

import copy
import json
import random

import numpy as np
import pytest

from jaxformer.tokenizers import bpe, byte_alphabet, formats, hf_json, patterns
from jaxformer.tokenizers.patterns import Pattern

LINES = (
    "The cats sat on the mats; they'll sit there for 12345 days, won't they?",
    "def f(x):\n    return x  # naïve, Größe\n\n\tprint(f(3.14))",
    "привет мир, 你好世界 и всё 😀",
)
PATTERNS = {
    "gpt2": patterns.GPT2,
    "cl100k": patterns.CL100K,
    "cl100k_tiktoken": patterns.CL100K_TIKTOKEN,
    "o200k": patterns.O200K,
    "single digits": patterns.gpt2("single"),
    "own": Pattern(r"\s?\p{L}+|\p{Nd}|[^\s\p{L}\p{Nd}]+|\s+"),
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def trained(pattern=patterns.GPT2) -> bpe.Bpe:
    return bpe.train(LINES, vocab_size=330, special_tokens=["<|end|>", "<pad>"], pattern=pattern)


def texts(number):
    rng = random.Random(0)
    parts = (
        "the",
        " cat",
        "'ll",
        "  ",
        "\n",
        "\r\n ",
        "123",
        "é",
        "你",
        "<|end|>",
        " ",
        "\u0e01\u0e31",
    )

    def part():
        code = rng.randrange(rng.choice((0x80, 0x250, 0x3000, 0x110000)))
        return rng.choice((*parts, "" if 0xD800 <= code < 0xE000 else chr(code)))

    return ["".join(part() for _ in range(rng.randrange(20))) for _ in range(number)]


def value(**changes):
    """A tokenizer.json, with changes of its parts, or of its model by `model_...`."""
    parts = copy.deepcopy(trained().to_json())
    for name, change in changes.items():
        if name.startswith("model_"):
            parts["model"][name.removeprefix("model_")] = change
        else:
            parts[name] = change
    return parts


def with_merge(*pairs):
    return value(model_merges=[*trained().to_json()["model"]["merges"], *pairs])


def split(regex, behavior="Isolated", invert=False, kind="Regex", use_regex=False):
    step = {"type": "Split", "pattern": {kind: regex}, "behavior": behavior, "invert": invert}
    byte_level = {**BYTE_LEVEL, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [step, byte_level]}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_the_other_library_gives_the_same_ids_and_the_value_comes_back(pattern):
    tokenizers = pytest.importorskip("tokenizers")
    ours = trained(pattern)
    text = json.dumps(ours.to_json())
    assert hf_json.bpe_from_json(json.loads(text)) == ours
    theirs = tokenizers.Tokenizer.from_str(text)
    for text in texts(500):
        allowed = ours.encode(text, allow_special=ours.special_tokens)
        assert theirs.encode(text, add_special_tokens=False).ids == allowed
        assert theirs.decode(allowed, skip_special_tokens=False) == ours.decode(allowed)
    theirs.encode_special_tokens = True
    for text in texts(500):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_what_the_other_library_trained_and_wrote_gives_its_ids():
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    theirs.enable_padding(length=7)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<|end|>", "<pad>"],
        show_progress=False,
    )
    theirs.train_from_iterator(LINES, trainer)
    theirs.add_tokens(["more words"])
    ours = hf_json.bpe_from_json(json.loads(theirs.to_str()))
    assert ours.special_tokens == {"<|end|>": 0, "<pad>": 1, "more words": 330}
    theirs.no_padding()
    for text in texts(300):
        ids = ours.encode(text, allow_special=ours.special_tokens)
        assert theirs.encode(text).ids == ids


def test_words_that_are_tokens_are_taken_whole_by_both():
    tokenizers = pytest.importorskip("tokenizers")
    plain = trained()
    tokens = (*plain.tokens, b" zebra")
    ours = bpe.Bpe(
        tokens=tokens,
        merges=plain.merges,
        special_tokens=plain.special_tokens,
        whole_words=True,
    )
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))
    assert theirs.encode("a zebra").ids == ours.encode("a zebra")
    assert ours.encode("a zebra")[-1] == len(tokens) - 1
    assert hf_json.bpe_from_json(ours.to_json()) == ours


def test_merges_may_be_written_as_pairs_and_much_may_be_left_out():
    parts = value()
    parts["model"]["merges"] = [merge.split(" ") for merge in parts["model"]["merges"]]
    for name in ("version", "truncation", "padding", "normalizer", "post_processor", "decoder"):
        del parts[name]
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "ignore_merges", "fuse_unk"):
        del parts["model"][name]
    assert hf_json.bpe_from_json(parts) == trained()


def test_the_characters_of_bytes_are_those_of_the_other_library():
    tokenizers = pytest.importorskip("tokenizers")
    every = [bytes([i]) for i in range(256)]
    assert set(byte_alphabet.write(every)) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet.read(byte_alphabet.write(every)) == every
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(written, _)] = split.pre_tokenize_str("\x00 é\u3000🙂")
    assert byte_alphabet.write(["\x00 é\u3000🙂".encode()]) == [written]


@pytest.mark.parametrize(
    ("pre_tokenizer", "pattern"),
    [
        (BYTE_LEVEL, patterns.GPT2),
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, patterns.GPT2),
        ({**BYTE_LEVEL, "use_regex": False}, Pattern(r"[\s\S]+")),
        (split(patterns.CL100K.regex), patterns.CL100K),
        (split(patterns.O200K.regex, "Removed", invert=True), patterns.O200K),
        (
            split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
            patterns.GPT2,
        ),
        (split(r"\d|[^0-9]+"), Pattern(r"\p{Nd}|[^0-9]+")),
        (split("a.b", kind="String"), Pattern(r"a\.b")),
    ],
)
def test_pre_tokenizers_cut_as_the_other_library_does(pre_tokenizer, pattern):
    tokenizers = pytest.importorskip("tokenizers")
    parts = value(pre_tokenizer=pre_tokenizer)
    ours = hf_json.bpe_from_json(parts)
    assert ours.pattern == pattern
    theirs = tokenizers.Tokenizer.from_str(json.dumps(parts))
    theirs.encode_special_tokens = True
    for text in (*texts(200), "xa.by acb ٣ 12"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer 'NFC'"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
            "Sequence of Lowercase",
        ),
        ({"pre_tokenizer": None}, "pre_tokenizer is malformed"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "add_prefix_space"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
                }
            },
            "Digits, ByteLevel",
        ),
        ({"pre_tokenizer": split("a", use_regex=True)}, "cuts twice"),
        ({"pre_tokenizer": split("a", "Removed")}, "'Removed'"),
        ({"pre_tokenizer": split("a", "MergedWithNext")}, "'MergedWithNext'"),
        ({"pre_tokenizer": split(r"\w+|\W+")}, r"\\w"),
        ({"pre_tokenizer": split(r"[a-z&&[aeiou]]")}, "&&"),
        ({"pre_tokenizer": split(r"[[:alpha:]]+")}, r"\[ in"),
        ({"pre_tokenizer": split(r"a+$")}, r"\$"),
        ({"pre_tokenizer": split(r"(a")}, "malformed"),
        ({"pre_tokenizer": split(r"\p{Greek}+")}, "Greek"),
        ({"model_dropout": 0.1}, "dropout"),
        ({"model_continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        ({"model_vocab": None}, "model.vocab is missing"),
        ({"model_vocab": {}}, "model.vocab is empty"),
        ({"model_vocab": {"a": "0"}}, "'a' the id '0'"),
        ({"model_vocab": {"a": True}}, "'a' the id True"),
        ({"model_vocab": {"a": 0, "b": 0}}, "'a' and 'b' the id 0"),
        ({"model_vocab": {"a": -1}}, "id -1"),
        ({"model_vocab": {"a": 1 << 40}}, "id 1099511627776"),
        ({"model_vocab": {"": 1}}, "empty token"),
        ({"model_vocab": {"日": 1}, "model_merges": [], "added_tokens": []}, "'日' holds '日'"),
        ({"model_merges": None}, "model.merges is missing"),
        ({"model_merges": {"a": "b"}}, "model.merges is missing or no list"),
        ({"added_tokens": [{"content": "x"}]}, "no token and id"),
        ({"added_tokens": 3}, "added_tokens is no list"),
        ({"added_tokens": [{"content": "x", "id": 2, "special": True}]}, "'x' has the id 2"),
        ({"added_tokens": [{"content": "x", "id": -2}]}, "'x' has the id -2"),
        ({"added_tokens": [{"content": "x", "id": 999, "lstrip": True}]}, "lstrip"),
        ({"added_tokens": [{"content": "x", "id": 999, "single_word": True}]}, "single_word"),
    ],
)
def test_what_would_change_ids_or_is_malformed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        formats.from_json(value(**changes))


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (["a"], "is no pair"),
        (["a", "b", "c"], "is no pair"),
        (["a", 5], "is no pair"),
        ("a", "is no pair"),
        (["ab", "zz"], "'ab'|'zz'"),
        (["q", "x"], "needs the token 'qx'"),
    ],
)
def test_a_merge_that_cannot_be_is_named(merge, message):
    with pytest.raises(ValueError, match=message):
        hf_json.bpe_from_json(with_merge(merge))


def test_a_merge_that_is_there_twice_is_named():
    first = trained().to_json()["model"]["merges"][0]
    number = len(trained().merges)
    with pytest.raises(ValueError, match=rf"merges\[{number}\].* is also merge 0"):
        hf_json.bpe_from_json(with_merge(first))


def test_an_added_token_that_merges_need_is_refused():
    left, right = trained().to_json()["model"]["merges"][0].split(" ")
    vocab = value()["model"]["vocab"]
    added = [{"content": left + right, "id": vocab[left + right]}]
    with pytest.raises(ValueError, match="is also part of a merge"):
        hf_json.bpe_from_json(value(added_tokens=added))


def test_a_special_token_spelled_as_another_is_not_written():
    tokens = tuple(bytes([i]) for i in range(256))
    ours = bpe.Bpe(tokens=tokens, merges=np.zeros((0, 2), np.int32), special_tokens={"a": 256})
    with pytest.raises(ValueError, match="special token 'a'"):
        ours.to_json()


def test_a_pattern_that_is_read_otherwise_elsewhere_is_not_written():
    with pytest.raises(ValueError, match=r"\\w"):
        trained(Pattern(r"\w+|[\s\S]")).to_json()


def test_gpt2_gives_its_ids_in_the_other_library(real_data, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = formats.load(real_data / "vocab/gpt2")
    ours.save(tmp_path / "tokenizer.json")
    assert formats.load(tmp_path / "tokenizer.json") == ours
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in texts(300):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text
