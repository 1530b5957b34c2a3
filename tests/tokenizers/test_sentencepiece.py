"""SentencePiece's BPE: the ids of its own library, its files, and its form in tokenizer.json."""

import dataclasses
import io
import json
import pickle
import random
import time

import numpy as np
import pytest

from jaxformer.tokenizers import protobuf, sentencepiece_json, sentencepiece_model
from jaxformer.tokenizers.sentencepiece import Kind, Piece, SentencePieceBpe

LINES = (
    "the cat sat on the mat with the other cats",
    "They said: 12 345 + 0.5 = 3,1415!",
    "Привет, мир! Как дела в мире?",
    "日本語のテキストと中文文本",
    "αβγ δεζ the  double   spaces",
    "emoji 😀😃 and the end",
) * 20
USER_DEFINED = ("foo", "foobar", "▁end", "\n\n", "x ")
SETTINGS = {
    "as Llama": {"byte_fallback": True, "split_digits": True, "remove_extra_whitespaces": False},
    "without bytes": {"byte_fallback": False},
    "without prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "pieces over spaces": {"split_by_whitespace": False, "remove_extra_whitespaces": False},
    "spaces alone": {"allow_whitespace_only_pieces": True, "add_dummy_prefix": False},
    "user-defined": {"byte_fallback": True, "user_defined_symbols": list(USER_DEFINED)},
    "user-defined, spaces kept": {
        "user_defined_symbols": list(USER_DEFINED),
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
}


def trained(**settings) -> bytes:
    spm = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        character_coverage=0.995,
        minloglevel=3,
        **settings,
    )
    return out.getvalue()


def texts(number: int, seed: int = 0):
    """Text of all planes, with much of what the models know and of what they treat apart."""
    rng = random.Random(seed)
    parts = ("the", "cat", " ", "  ", "▁", "▁▁", " the", "<s>", "</s>", "<unk>", "<0x41>", "\n\n")
    parts += (*USER_DEFINED, " end", "x  ", "мир", "日本", "12", "0", "\n", "\t", "😀", "⁇")

    def part():
        if rng.random() < 0.75:
            return rng.choice(parts)
        code = rng.randrange(rng.choice((0x80, 0x3000, 0x110000)))
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ud7ff"

    return [
        "",
        " ",
        "▁",
        *("".join(part() for _ in range(rng.randrange(25))) for _ in range(number)),
    ]


def tiny(*extra: Piece, **fields) -> SentencePieceBpe:
    """Letters a to d, and what else is given."""
    letters = [Piece(c, -50.0 - i, Kind.NORMAL) for i, c in enumerate("abcd▁")]
    head = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL)]
    fields = {"byte_fallback": False, "add_dummy_prefix": False} | fields
    return SentencePieceBpe(pieces=(*head, *letters, *extra), **fields)


def strings(model: SentencePieceBpe, text: str) -> list[str]:
    return [model.pieces[token].text for token in model.encode(text)]


def test_the_piece_of_the_highest_score_is_merged_first():
    model = tiny(Piece("ab", -2.0, Kind.NORMAL), Piece("bc", -1.0, Kind.NORMAL))
    assert strings(model, "abc") == ["a", "bc"]


def test_of_equal_pieces_the_leftmost_is_merged():
    model = tiny(Piece("aa", -1.0, Kind.NORMAL))
    assert strings(model, "aaa") == ["aa", "a"]


def test_parts_merge_in_every_way_that_gives_a_piece():
    model = tiny(
        *(Piece(text, -float(i), Kind.NORMAL) for i, text in enumerate(["ab", "cd", "abcd"]))
    )
    assert strings(model, "abcd") == ["abcd"]
    model = tiny(
        *(Piece(text, -float(i), Kind.NORMAL) for i, text in enumerate(["bc", "abc", "abcd"]))
    )
    assert strings(model, "abcd") == ["abcd"]


def test_parts_that_are_no_pieces_may_still_merge():
    assert strings(tiny(Piece("xy", -1.0, Kind.NORMAL)), "xyx") == ["xy", "<unk>"]


def test_a_run_of_unknown_characters_is_one_token():
    assert strings(tiny(), "axyzbx") == ["a", "<unk>", "b", "<unk>"]


def test_control_pieces_come_from_no_text_unless_allowed():
    model = tiny(Piece("<", -1.0, Kind.NORMAL))
    assert 1 not in model.encode("<s>")
    assert model.encode("a<s>b", allow_special=["<s>"]) == [2, 1, 3]


def test_the_longest_user_defined_piece_is_cut_out_before_anything_merges():
    extra = [Piece("ab", -1.0, Kind.NORMAL), Piece("bc", 0.0, Kind.USER_DEFINED)]
    model = tiny(*extra, Piece("bcd", 0.0, Kind.USER_DEFINED))
    assert strings(model, "abcabcda") == ["a", "bc", "a", "bcd", "a"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_ids_and_files_are_those_of_the_sentencepiece_library(settings):
    spm = pytest.importorskip("sentencepiece")
    data = trained(**settings)
    model = sentencepiece_model.parse(data)
    library = spm.SentencePieceProcessor(model_proto=data)
    again = sentencepiece_model.serialize(model)
    assert sentencepiece_model.parse(again) == model
    written = spm.SentencePieceProcessor(model_proto=again)
    assert (written.bos_id(), written.eos_id()) == (model.bos, model.eos)
    for text in texts(300):
        ids = model.encode(text)
        assert ids == library.encode(text) == written.encode(text), text
        assert "".join(model.decode_stream(ids)) == model.decode(ids)
        if "▁" not in text and model.unknown_id not in ids:
            assert model.decode(ids) == library.decode(ids), text


def test_text_and_any_bytes_come_back_where_spaces_are_kept_and_characters_become_bytes():
    model = sentencepiece_model.parse(trained(**SETTINGS["as Llama"]))
    rng = random.Random(1)
    for text in texts(300, seed=2):
        text = text.replace("▁", "_")
        assert model.decode(model.encode(text)) == text
    for _ in range(200):
        data = bytes(rng.choices(b" atx\xff\xc3\xa9\xe2\x96\xed\xa0", k=rng.randrange(20)))
        if "▁".encode() not in data:
            assert model.decode_bytes(model.encode_bytes(data)) == data


def test_bytes_that_are_no_utf8_need_byte_fallback():
    with pytest.raises(ValueError, match="UTF-8"):
        tiny().encode_bytes(b"a\xff")


def test_decoding_never_shows_half_a_character():
    model = sentencepiece_model.parse(trained(**SETTINGS["as Llama"]))
    parts = list(model.decode_stream(model.encode("a ☃")))
    assert "".join(parts) == "a ☃"
    assert parts[-3:] == ["", "", "☃"]


@pytest.mark.parametrize("by_word", [True, False])
def test_time_grows_nearly_linearly_with_the_length_of_a_word(by_word):
    across = [] if by_word else [Piece("a▁", -9.0, Kind.NORMAL)]
    extra = [Piece(text, -float(i), Kind.NORMAL) for i, text in enumerate(["ab", "cd", "abcd"])]
    model = tiny(*extra, *across)
    times = []
    for size in (20_000, 160_000):
        text = "".join(random.Random(0).choices("abcd", k=size))
        start = time.process_time()
        ids = model.encode(text)
        times.append(time.process_time() - start)
        assert model.decode(ids) == text
    assert times[1] < 24 * times[0]  # 8 if linear, 64 if quadratic


def test_the_cache_of_words_is_bounded_and_no_part_of_the_value():
    model = tiny()
    model._rules.CACHED_WORDS = 10
    for i in range(100):
        model.encode(f"{'a' * i}")
    assert len(model._rules.cache) <= 10
    assert model == tiny()
    assert pickle.loads(pickle.dumps(model)) == model
    assert "_rules_cache" not in pickle.loads(pickle.dumps(model)).__dict__


def test_every_field_is_part_of_the_value():
    model = sentencepiece_model.parse(trained(**SETTINGS["as Llama"]))
    changes = {
        "pieces": (*model.pieces, Piece("new", -9.0, Kind.NORMAL)),
        "byte_fallback": False,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": True,
        "bos": None,
        "eos": None,
    }
    for name, value in changes.items():
        changed = dataclasses.replace(model, **{name: value}, special_tokens={})
        assert changed != model
        assert SentencePieceBpe.from_json(json.loads(json.dumps(changed.to_json()))) == changed
        assert sentencepiece_model.parse(sentencepiece_model.serialize(changed)) == changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pieces": (Piece("a", 0.0, Kind.NORMAL),)}, "one unknown piece; this has 0"),
        ({"byte_fallback": True}, "<0x00>"),
        ({"bos": 2}, "bos=2"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceBpe(**{"pieces": tiny().pieces, "byte_fallback": False} | fields)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("", 0.0, Kind.NORMAL), "Piece 7 is empty"),
        (Piece("a", 0.0, Kind.NORMAL), "'a' has two ids: 2 and 7"),
        (Piece("ab", float("nan"), Kind.NORMAL), "score of piece 7"),
        (Piece("<0xG0>", 0.0, Kind.BYTE), "is no byte"),
    ],
)
def test_a_piece_that_cannot_be_is_refused(piece, message):
    with pytest.raises(ValueError, match=message):
        tiny(piece)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (protobuf.field(2, protobuf.field(3, 1)), "unigram"),
        (protobuf.field(2, protobuf.field(24, 1)), "treat_whitespace_as_suffix"),
        (protobuf.field(3, protobuf.field(2, b"x")), "normalizer"),
        (protobuf.field(5, protobuf.field(2, b"x")), "denormalizer"),
        (protobuf.field(3, protobuf.field(5, 0)), "escape_whitespaces"),
        (protobuf.field(1, protobuf.field(1, "x") + protobuf.field(3, 5)), "of type 5"),
        (protobuf.field(1, 7), "no SentencePiece model"),
        (b"\x0a\xff", "no SentencePiece model"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_a_model_that_would_encode_otherwise_is_refused(change, message):
    # Of a message that is there twice the fields are joined.
    with pytest.raises(ValueError, match=message):
        sentencepiece_model.parse(sentencepiece_model.serialize(tiny()) + change)


def test_every_truncation_of_a_model_is_refused_or_another_model():
    data = sentencepiece_model.serialize(tiny(Piece("ab", -1.0, Kind.NORMAL)))
    for size in range(len(data)):
        try:
            assert sentencepiece_model.parse(data[:size]).vocab_size > 0
        except ValueError:
            continue


@pytest.mark.parametrize("settings", list(SETTINGS.values())[:5], ids=list(SETTINGS)[:5])
def test_tokenizer_json_gives_the_same_ids_in_tokenizers_and_the_same_value_back(settings):
    tokenizers = pytest.importorskip("tokenizers")
    model = sentencepiece_model.parse(trained(**settings))
    text = json.dumps(sentencepiece_json.to_json(model))
    assert sentencepiece_json.from_json(json.loads(text)) == model
    library = tokenizers.Tokenizer.from_str(text)
    library.encode_special_tokens = True
    for text in texts(300, seed=3):
        ids = model.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids, text
        assert model.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_tokenizer_json_refuses_what_it_cannot_hold():
    merged = [Piece("ab", -1.0, Kind.NORMAL), Piece("cd", -1.0, Kind.NORMAL)]
    for model, message in (
        (tiny(Piece("ab", 0.0, Kind.USER_DEFINED)), "user-defined"),
        (tiny(*merged), "equal scores"),
        (tiny(Piece("xy", -1.0, Kind.NORMAL)), "no pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            sentencepiece_json.to_json(model)


def test_merges_that_are_not_all_of_sentencepiece_are_refused():
    extra = [Piece(text, -float(i), Kind.NORMAL) for i, text in enumerate(["ab", "bc", "abc"])]
    value = sentencepiece_json.to_json(tiny(*extra))
    value["model"]["merges"].remove(["a", "bc"])
    with pytest.raises(ValueError, match="'a' and 'bc'"):
        sentencepiece_json.from_json(value)


def test_the_stories_model_decodes_its_greedy_ids_and_encodes_them_back(real_data):
    folder = real_data / "pretrained/stories260k"
    model = sentencepiece_model.parse((folder / "tok512.model").read_bytes())
    with np.load(folder / "golden.npz") as golden:
        ids, prompt = golden["greedy_ids"].tolist(), golden["prompt_ids"].tolist()
    expected = (folder / "expected_greedy.txt").read_text()
    assert ids[0] == model.bos
    text = model.decode(ids[1:])
    assert expected.startswith(text) or text.startswith(expected)
    assert model.encode(model.decode(prompt[1:])) == prompt[1:]
    assert model.decode(ids) == "<s> " + text
    assert sentencepiece_json.from_json(sentencepiece_json.to_json(model)) == model
