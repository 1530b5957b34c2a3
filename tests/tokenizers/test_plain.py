import json
import random

import numpy as np
import pytest

from jaxformer.tokenizers import plain
from jaxformer.tokenizers.plain import Bytes, Characters, Words


def random_text(seed, length):
    """Characters of all planes, white space among them."""
    draw = random.Random(seed)
    codes = [draw.choice((0x20, 0x80, 0x3000, 0x110000)) for _ in range(length)]
    text = "".join(chr(draw.randrange(limit + 1 if limit == 0x20 else limit)) for limit in codes)
    return text.encode("utf-8", "ignore").decode()


# Bytes.


def test_an_id_is_a_byte_of_utf8():
    assert Bytes().encode("Aé") == [65, 195, 169]
    assert Bytes().vocab_size == 256


def test_any_bytes_come_back():
    for seed in range(200):
        data = random.Random(seed).randbytes(seed)
        assert Bytes().encode_bytes(data) == list(data)
        assert Bytes().decode_bytes(Bytes().encode_bytes(data)) == data


def test_bytes_that_are_no_utf8_decode_visibly():
    assert Bytes().decode([65, 255, 66]) == "A\ufffdB"
    with pytest.raises(UnicodeDecodeError):
        Bytes().decode([255], errors="strict")


def test_special_tokens_lie_beyond_the_bytes():
    tokenizer = Bytes(special_tokens={"<end>": 300})
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([65, 300, 66]) == "A<end>B"
    with pytest.raises(ValueError, match=r"id 299: .* size 301"):
        tokenizer.decode([299])
    with pytest.raises(ValueError, match=r"id 255 .* '<x>'"):
        Bytes(special_tokens={"<x>": 255})
    with pytest.raises(ValueError, match="-1"):
        Bytes(special_tokens={"<x>": -1})
    with pytest.raises(ValueError, match=r"id 256 .* '<y>'"):
        Bytes(special_tokens={"<x>": 256, "<y>": 256})


# Characters.


def test_frequent_characters_come_first_and_ties_by_code_point():
    tokenizer = Characters.train(["cabb", "abc", "b"], special_tokens=["<pad>"])
    assert tokenizer.tokens == (None, "b", "a", "c")
    assert tokenizer.special_tokens == {"<pad>": 0}
    assert tokenizer.encode("abc") == [2, 1, 3]


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger():
    texts = ["to be, or not to be, that is the question"]
    whole = Characters.train(texts, unknown="<unk>").tokens
    for size in range(1, len(whole)):
        assert Characters.train(texts, vocab_size=size, unknown="<unk>").tokens == whole[:size]


def test_an_unlisted_character_is_named_with_its_place():
    tokenizer = Characters.train(["abc" * 200])
    for text, place in (("abx", 2), ("abc" * 100 + "xa", 300), ("abc" * 100 + "üx", 300)):
        with pytest.raises(ValueError, match=rf"{text[place]!r} .* at character {place} is"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"'x' \(U\+0078\) at character 1 of text 2"):
        tokenizer.encode_batch(["", "abc", "cx"])


def test_the_unknown_token_stands_for_each_unlisted_character_and_shows():
    tokenizer = Characters.train(["hello"], unknown="<unk>")
    for text in ("hello😀é", "hello" * 50 + "\U0010ffff!"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert ids[-2:] == [tokenizer.unknown_id] * 2
        assert tokenizer.decode(ids) == text[:-2] + "<unk><unk>"


def test_characters_left_out_without_an_unknown_token_are_refused_in_training():
    for options in ({"vocab_size": 2}, {"min_frequency": 2}):
        with pytest.raises(ValueError, match=r"leave . of 4"):
            Characters.train(["aabc", "d"], **options)
    assert Characters.train(["aabc"], min_frequency=2, unknown="?").tokens == (None, "a")


def test_training_arguments_that_cannot_be_are_refused():
    for kind in (Characters, Words):
        with pytest.raises(ValueError, match="several texts"):
            kind.train("one text")
        with pytest.raises(ValueError, match="named twice"):
            kind.train(["a"], special_tokens=["<x>", "<x>"])
        with pytest.raises(ValueError, match="vocab_size=1 does not hold"):
            kind.train(["a"], special_tokens=["<x>", "<y>"], vocab_size=1)
        with pytest.raises(ValueError, match="lone surrogate"):
            kind.train(["a \udc80"])


def test_no_texts_give_an_empty_vocabulary():
    assert Characters.train([]).vocab_size == 0
    assert Characters.train([]).encode("") == []
    assert Words.train([]).tokens == (None, " ")


def test_text_of_all_planes_comes_back_by_characters():
    texts = [random_text(seed, 300) for seed in range(20)]
    tokenizer = Characters.train(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


# Words.


def test_words_carry_their_space_and_other_white_space_stands_alone():
    assert plain.WORDS.split("the cat  sat\n\non \n a\u3000mat ") == [
        *["the", " cat", " ", " sat", "\n\n", "on", " \n", " a", "\u3000", "mat", " "]
    ]


def test_words_join_to_the_text_on_all_planes():
    for seed in range(200):
        text = random_text(seed, 80)
        assert "".join(plain.WORDS.split(text)) == text
        tokenizer = Words.train([text], unknown=None)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_listed_word_is_found_with_and_without_its_space():
    tokenizer = Words.train(["the cat"])
    assert tokenizer.tokens == (None, " ", " cat", "the")
    assert tokenizer.encode("the the") == [3, 1, 3]
    assert tokenizer.decode([3, 1, 3]) == "the the"


def test_an_unlisted_word_shows_and_its_white_space_stays():
    tokenizer = Words.train(["the cat sat\n\n"])
    text = "the dog\n\nsat \n\n\n cat"
    assert tokenizer.decode(tokenizer.encode(text)) == "the <unk>\n\n<unk> \n\n\n cat"
    assert tokenizer.decode(tokenizer.encode(text)).count("<unk>") == 2


def test_an_unlisted_word_without_an_unknown_token_is_named_with_its_place():
    tokenizer = Words.train(["the cat"], unknown=None)
    with pytest.raises(ValueError, match="'dog' at character 8"):
        tokenizer.encode("the cat dog")


def test_rare_words_are_left_out_and_white_space_never_is():
    tokenizer = Words.train(["a a a b\tb c\r\n"], min_frequency=2)
    assert set(tokenizer.tokens) == {None, " ", "\t", "\r", "\n", " a"}
    with pytest.raises(ValueError, match=r"vocab_size=4 .* 4 characters of white space"):
        Words.train(["a a a b\tb c\r\n"], vocab_size=4)


def test_information_separators_are_no_white_space():
    """Python counts U+001C to U+001F as such; Unicode does not."""
    assert plain.WORDS.split("a\x1cb\x85c") == ["a\x1cb", "\x85", "c"]


# What both are made from.


def test_a_list_that_is_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="tokens 0 and 2 are both 'a'"):
        Characters(tokens=("a", "b", "a"))
    with pytest.raises(ValueError, match="token 1 is not one character: 'bc'"):
        Characters(tokens=("a", "bc"))
    with pytest.raises(ValueError, match="token 0 is no text"):
        Words(tokens=("",))
    with pytest.raises(ValueError, match="'<unk>' is no special token"):
        Words(tokens=("a",), unknown="<unk>")
    with pytest.raises(ValueError, match="id 0 of the special token '<x>'"):
        Words(tokens=("a",), special_tokens={"<x>": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "'tokens'"),
        ({"tokens": ["a", 1]}, "no string: 1"),
        ({"special_tokens": {"<x>": "1"}}, "'<x>'"),
        ({"unknown": 3}, "'unknown'"),
        ({"other": 3}, "'other'"),
        ({"jaxformer": "words"}, "'words'"),
    ],
)
def test_malformed_descriptions_are_refused(change, message):
    data = Characters.train(["abc"]).to_json()
    assert Characters.from_json(json.loads(json.dumps(data))).to_json() == data
    with pytest.raises(ValueError, match=message):
        Characters.from_json({**data, **change})
    del data["tokens"]
    with pytest.raises(ValueError, match="'tokens'"):
        Characters.from_json(data)


def test_long_texts_and_short_ones_have_the_same_ids():
    tokenizer = Characters.train(["añb "], unknown="<unk>")
    text = "añb x" * 100
    assert tokenizer.encode(text) == [tokenizer.encode(c)[0] for c in text]
    assert tokenizer.encode_array(text).dtype == np.int32
