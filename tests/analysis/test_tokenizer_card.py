import io
import json
import random
import subprocess
import sys

import pytest
import rich.console

from jaxformer.analysis import tokenizer_card
from jaxformer.tokenizers import alphabets, kmers, plain
from jaxformer.tokenizers.tokenizer import Tokenizer

ENGLISH = ["The quick brown fox jumps over the lazy dog.\n" * 20, "To be, or not to be." * 20]


class Upper(plain.Bytes):
    """Loses case without saying so."""

    def _encode(self, text: str) -> list[int]:
        return super()._encode(text.upper())

    def _encode_flat(self, texts):
        return Tokenizer._encode_flat(self, texts)

    def encode_bytes(self, data: bytes) -> list[int]:
        return super().encode_bytes(data.upper())


def test_one_ascii_character_is_one_byte():
    card = tokenizer_card.stability(plain.Bytes(), ENGLISH, edits=100)
    assert card == {"edit_distance_mean": 1, "edit_distance_p95": 1, "edits_refused": 0}


def test_a_character_of_three_bytes_changes_up_to_three_ids():
    one = tokenizer_card.stability(plain.Bytes(), ["字" * 50], edits=50)
    assert one["edit_distance_mean"] == one["edit_distance_p95"] == 3  # nothing else to put there
    two = tokenizer_card.stability(plain.Bytes(), ["字好" * 50], edits=200)
    assert 2 < two["edit_distance_mean"] < 3
    characters = plain.Characters.train(["字好"])
    assert tokenizer_card.stability(characters, ["字好"], edits=9)["edit_distance_mean"] == 1


def test_words_side_by_side_are_the_less_stable():
    texts = ["".join(random.Random(0).choices("ACGT", k=600))]
    dna = alphabets.dna()
    side = tokenizer_card.stability(kmers.kmers(dna, 6, letters="ACGT"), texts, edits=50)
    over = tokenizer_card.stability(
        kmers.kmers(dna, 6, letters="ACGT", overlap=True), texts, edits=50
    )
    assert over["edit_distance_p95"] <= 6
    assert side["edit_distance_mean"] > 2 * over["edit_distance_mean"]


def test_edits_that_are_refused_are_counted():
    words = plain.Words.train(["one two three"], unknown=None)
    card = tokenizer_card.stability(words, ["one two three"], edits=100)
    assert 50 < card["edits_refused"] < 100  # but for a space more, or a word and space less
    assert card["edit_distance_mean"] >= 1


def test_draws_repeat_and_change_with_the_seed():
    tokenizer = plain.Words.train(ENGLISH)
    first = tokenizer_card.stability(tokenizer, ENGLISH, edits=50)
    assert tokenizer_card.stability(tokenizer, ENGLISH, edits=50) == first
    assert tokenizer_card.stability(tokenizer, ENGLISH, edits=50, seed=1) != first


def test_efficiency_counts_bytes_words_and_unknown_tokens():
    assert tokenizer_card.efficiency(plain.Bytes(), ["naïve cat\n", ""]) == {
        "bytes_per_token": 1,
        "tokens_per_word": 11 / 2,
        "unknown_share": 0,
        "lossy_lines": 0,
    }
    tokenizer = plain.Words.train(["a cat"])
    assert tokenizer_card.efficiency(tokenizer, ["a cat\n", "dog"]) == {
        "bytes_per_token": 9 / 4,
        "tokens_per_word": 4 / 3,
        "unknown_share": 2 / 4,  # the line end and the dog
        "lossy_lines": 1 / 2,
    }
    assert tokenizer_card.efficiency(Upper(), ["A\nb\nC"])["lossy_lines"] == 1 / 3
    assert tokenizer_card.efficiency(plain.Bytes(), ["\n "])["tokens_per_word"] is None


def test_bytes_are_universal_over_all_scalars():
    """In a process of its own, where no call is type-checked: there are millions."""
    program = (
        "import json\n"
        "from jaxformer.analysis import tokenizer_card\n"
        "from jaxformer.tokenizers import plain\n"
        "print(json.dumps(tokenizer_card.universality(plain.Bytes())))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    card = json.loads(run.stdout)
    assert card.pop("scalars") == 1_112_064
    assert card.pop("strings") == 100_000
    assert set(card.values()) == {0}


def test_what_is_refused_unknown_or_changed_is_counted():
    dna = tokenizer_card.universality(alphabets.dna(), strings=0, every=67)
    letters = sum(ord(letter) % 67 == 0 for letter in "ACGTRYSWKMBDHVN-.")
    assert dna["scalars_refused"] == dna["scalars"] - letters
    assert dna["scalars_unknown"] == dna["scalars_changed"] == 0

    known = plain.Characters.train(["\x00ᎈ"], unknown="<unk>")
    card = tokenizer_card.universality(known, strings=500, every=500)
    assert card["scalars_unknown"] == card["scalars"] - 2
    assert card["scalars_refused"] == 0
    assert 0 < card["strings_unknown"] < 500 - card["strings_refused"] + 1

    upper = tokenizer_card.universality(Upper(), strings=500, every=997)
    lower = sum(
        chr(i) != chr(i).upper() for i in range(0, 0x110000, 997) if not 0xD800 <= i < 0xE000
    )
    assert upper["scalars_changed"] == lower > 0
    assert 0 < upper["strings_changed"] < 500


def test_a_uniform_text_has_its_entropy_in_bits_per_byte():
    draw = random.Random(0)
    texts = ["".join(draw.choices("ACGT", k=20_000)) for _ in range(2)]
    for tokenizer in (
        plain.Bytes(),
        alphabets.dna(),
        kmers.kmers(alphabets.dna(), 2, letters="ACGT"),
    ):
        card = tokenizer_card.learnability(tokenizer, texts[:1], texts[1:], segmentations=[])
        assert card["bits_per_byte"] == pytest.approx(2, rel=0.01)
    assert card["morpheme_f1"] is None


def test_a_text_that_repeats_is_learned():
    card = tokenizer_card.learnability(plain.Bytes(), ["abcd" * 500], ["abcd" * 100])
    assert card["bits_per_byte"] < 0.05
    higher = tokenizer_card.learnability(plain.Bytes(), ["aabb" * 500], ["aabb" * 100], order=3)
    assert higher["bits_per_byte"] < 0.05
    assert tokenizer_card.learnability(plain.Bytes(), ["aabb"], ["aabb"])["morpheme_recall"] == 1


def test_ids_of_bytes_and_words_are_encoded_to_themselves_or_not():
    assert tokenizer_card.reencoding(plain.Bytes(), ENGLISH, draws=100) == {
        "reencoded_cuts": 0,
        "reencoded_pairs": 0,
    }
    tokenizer = plain.Words(tokens=("a", "b", " a", " "), special_tokens={"<x>": 9})
    # Joined, these pairs are other words: aa ab ba bb, " aa" " ab", "  " but not "  a", " " " a".
    card = tokenizer_card.reencoding(tokenizer, ["a a b"], draws=1000)
    pairs = [[i, j] for i in range(4) for j in range(4)]
    wrong = 0
    for pair in pairs:
        try:
            wrong += tokenizer.encode(tokenizer.decode(pair)) != pair
        except ValueError:
            wrong += 1
    assert card["reencoded_pairs"] == pytest.approx(wrong / len(pairs), abs=0.05)
    assert 0 < wrong < 16


def test_no_text_and_refused_text_are_errors():
    for measure in (tokenizer_card.efficiency, tokenizer_card.reencoding):
        with pytest.raises(ValueError, match="no text"):
            measure(plain.Bytes(), [""])
        with pytest.raises(ValueError, match="is no token"):
            measure(alphabets.dna(), ["prose"])
    with pytest.raises(ValueError, match="no text"):
        tokenizer_card.stability(plain.Bytes(), [""])
    refused = tokenizer_card.stability(alphabets.dna(), ["prose"], edits=7)
    assert refused["edits_refused"] == 7
    assert refused["edit_distance_mean"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": 0}, "edits is at least 1, got 0"),
        ({"every": 0}, "every is at least 1, got 0"),
        ({"every": -1}, "every is at least 1, got -1"),
        ({"strings": -5}, "strings is at least 0, got -5"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    few = {"edits": 1, "strings": 1, "every": 99999, **options}
    with pytest.raises(ValueError, match=message):
        tokenizer_card.card(plain.Bytes(), ENGLISH, **few)


def test_a_text_of_one_character_cannot_be_parted():
    few = {"edits": 1, "strings": 1, "every": 99999}
    with pytest.raises(ValueError, match="text of 1 character leaves none for training"):
        tokenizer_card.card(plain.Bytes(), ["a"], **few)
    assert tokenizer_card.card(plain.Bytes(), ["a"], training=["a"], **few)["vocab_size"] == 256
    assert tokenizer_card.card(plain.Bytes(), ["ab"], **few)["vocab_size"] == 256
    with pytest.raises(ValueError, match="draws is at least 1, got 0"):
        tokenizer_card.reencoding(plain.Bytes(), ["a"], draws=0)


def test_cards_are_numbers_that_stand_side_by_side():
    cards = {
        "bytes": tokenizer_card.card(plain.Bytes(), ENGLISH, edits=20, strings=100, every=999),
        "words": tokenizer_card.card(
            plain.Words.train(ENGLISH), ENGLISH, training=ENGLISH, edits=20, strings=100, every=999
        ),
    }
    assert json.loads(json.dumps(cards)) == cards
    shown = {key for measures in tokenizer_card.ROWS.values() for key in measures}
    assert shown | {"scalars", "strings"} == set(cards["bytes"]) == set(cards["words"])
    out = io.StringIO()
    rich.console.Console(file=out, width=80).print(tokenizer_card.table(cards))
    lines = out.getvalue().splitlines()
    vocabulary = next(line for line in lines if "vocabulary" in line)
    assert "256" in vocabulary
    assert str(int(cards["words"]["vocab_size"])) in vocabulary
    assert max(map(len, lines)) <= 80


def test_the_last_tenth_of_the_characters_is_held_out():
    assert tokenizer_card._last_tenth(["abcde", "fghij"]) == (["abcde", "fghi"], ["", "j"])
    assert tokenizer_card._last_tenth(["a" * 20, "bb"]) == (["a" * 19, ""], ["a", "bb"])
    assert tokenizer_card._last_tenth(["a" * 19 + " b"]) == (["a" * 19], [" b"])
    assert tokenizer_card._last_tenth(["a" * 17 + "bb b", "c"]) == (
        ["a" * 17 + "bb", ""],
        [" b", "c"],
    )


def test_cards_import_no_jax():
    program = (
        "import sys\n"
        "from jaxformer.analysis import tokenizer_card\n"
        "assert 'jax' not in sys.modules and 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
