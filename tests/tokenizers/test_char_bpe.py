"""Character BPE against a slow trainer that does one merge at a time, and against `tokenizers`."""

import collections
import dataclasses
import itertools
import json
import pickle
import random
import time

import numpy as np
import pytest

from jaxformer.tokenizers import char_bpe
from jaxformer.tokenizers.char_bpe import CharBpe

# Control characters that `str.split` takes for white space, and others that it does not.
SPACES, NO_SPACES = " \n\t\x85\u3000\u2028", "\x1c\x1f\u200b"


def slow_training(words, inside, ends, first, size, min_frequency):
    """One merge at a time, as the paper writes it, with ties broken by the ids of the pair."""
    names = [*first, *inside, *(character + "</w>" for character in ends)]
    ids = {name: i for i, name in enumerate(names)}
    spelled = []
    for word, count in words.items():
        symbols = [ids[character] for character in word[:-1] if character in inside]
        if word[-1] in inside:
            symbols.append(ids[word[-1] + "</w>"])
        spelled.append((symbols, count))
    merges = []
    while len(names) < size:
        counts = collections.Counter()
        for symbols, count in spelled:
            for pair in itertools.pairwise(symbols):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < min_frequency:
            break
        merges.append(best)
        names.append(names[best[0]] + names[best[1]])
        spelled = [(merged(symbols, best, len(names) - 1), count) for symbols, count in spelled]
    return names, merges


def merged(symbols, pair, result):
    out, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(result)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def characters_of(tokens):
    inside = [token for token in tokens if token and len(token) == 1]
    return inside, [t[0] for t in tokens if t and len(t) == 5 and t.endswith("</w>")]


def corpora(number):
    for seed in range(number):
        rng = random.Random(seed)
        alphabet = "abcde"[: rng.randrange(1, 6)] + rng.choice(("", "é中😀" + NO_SPACES))
        lines = []
        for _ in range(rng.randrange(1, 5)):
            words = ("".join(rng.choices(alphabet, k=rng.randrange(1, 9))) for _ in range(20))
            lines.append(rng.choice(SPACES).join(words))
        options = {
            "vocab_size": rng.randrange(25, 80),
            "min_frequency": rng.choice((0, 0, 2, 5)),
            "limit_alphabet": rng.choice((None, None, 3)),
        }
        yield rng, alphabet, lines, options


def count_words(lines):
    for space in SPACES:
        lines = [line.replace(space, " ") for line in lines]
    return collections.Counter(word for line in lines for word in line.split(" ") if word)


def test_training_does_what_one_merge_at_a_time_does():
    for _, _, lines, options in corpora(30):
        ours = char_bpe.train(lines, special_tokens=["<pad>"], **options)
        inside, ends = characters_of(ours.tokens)
        assert inside == sorted(inside)
        assert ends == sorted(ends)
        words, limit = count_words(lines), options.pop("limit_alphabet")
        counts = collections.Counter("".join(word * n for word, n in words.items()))
        by_count = sorted(counts, key=lambda character: (-counts[character], character))
        assert inside == sorted(by_count[:limit])
        names, merges = slow_training(words, inside, ends, [None], *options.values())
        assert list(ours.tokens) == names
        assert list(map(tuple, ours.merges.tolist())) == merges


def test_training_is_that_of_tokenizers_but_for_the_order_of_characters_that_end_words():
    tokenizers = pytest.importorskip("tokenizers")
    for _, _, lines, options in corpora(20):
        limit = options.pop("limit_alphabet")
        library = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
        library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        trainer = tokenizers.trainers.BpeTrainer(
            special_tokens=["<pad>"],
            end_of_word_suffix="</w>",
            show_progress=False,
            **options,
            **({} if limit is None else {"limit_alphabet": limit}),
        )
        library.train_from_iterator(lines, trainer)
        model = json.loads(library.to_str())["model"]
        theirs = sorted(model["vocab"], key=model["vocab"].__getitem__)
        inside, ends = characters_of(theirs)
        words = count_words(lines)
        names, merges = slow_training(words, inside, ends, ["<pad>"], *options.values())
        assert names == theirs
        assert [[names[a], names[b]] for a, b in merges] == model["merges"]
        if limit is None:
            ours = char_bpe.train(lines, special_tokens=["<pad>"], **options)
            assert characters_of(ours.tokens) == (inside, sorted(ends))


def test_ids_and_text_are_those_of_tokenizers_and_the_value_comes_back():
    tokenizers = pytest.importorskip("tokenizers")
    for rng, alphabet, lines, options in corpora(8):
        ours = char_bpe.train(lines, unknown="<unk>", special_tokens=["<s>"], **options)
        value = json.loads(json.dumps(ours.to_json()))
        assert CharBpe.from_json(value) == ours
        library = tokenizers.Tokenizer.from_str(json.dumps(value))
        for _ in range(60):
            text = "".join(rng.choices(alphabet + "z" + SPACES + NO_SPACES, k=rng.randrange(30)))
            ids = ours.encode(text)
            assert ids == library.encode(text, add_special_tokens=False).ids, text
            assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
            assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


def test_words_decode_with_one_space_between_them():
    model = char_bpe.train(["low lower newest widest low"], vocab_size=40)
    assert model.decode(model.encode(" low\n\n widest  low ")) == "low widest low"
    assert list(model.decode_stream(model.encode("low low"))) == ["low", " low"]


def test_a_smaller_vocabulary_is_the_first_part_of_a_larger_one():
    lines = ["low lower newest widest low"]
    model = char_bpe.train(lines, vocab_size=40, special_tokens=["<s>"])
    characters = 1 + sum(map(len, characters_of(model.tokens)))
    for size in range(characters, model.vocab_size):
        smaller = char_bpe.train(lines, vocab_size=size, special_tokens=["<s>"])
        assert model.truncate(size) == smaller
    with pytest.raises(ValueError, match=f"{characters} to {model.vocab_size}"):
        model.truncate(characters - 1)


def test_a_character_without_a_token_is_unknown_or_an_error():
    lines = ["ab ab"]
    assert char_bpe.train(lines, vocab_size=9, unknown="?").encode("xab") != []
    model = char_bpe.train(lines, vocab_size=9)
    with pytest.raises(ValueError, match=r"'x' \(U\+0078\) at character 4"):
        model.encode("ab axb")
    with pytest.raises(ValueError, match="where a word ends"):
        model.encode("ba")


def test_the_unknown_token_comes_first_and_special_tokens_are_no_text():
    model = char_bpe.train(["ab <s>"], vocab_size=20, unknown="<unk>", special_tokens=["<s>"])
    assert model.special_tokens == {"<unk>": 0, "<s>": 1}
    assert 1 not in model.encode("ab <s>")
    assert model.encode("<s>ab", allow_special=["<s>"])[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "vocab_size=3 is smaller than the alphabet"),
        ({"vocab_size": 30, "special_tokens": ["a", "a"]}, "repeat"),
        ({"vocab_size": 30, "end_of_word": ""}, "end_of_word"),
        ({"vocab_size": 30, "end_of_word": "b"}, "'ab' holds the mark 'b'"),
        ({"vocab_size": 30, "limit_alphabet": -1}, "limit_alphabet=-1"),
    ],
)
def test_training_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        char_bpe.train(["ab cd"], **options)


def test_merges_that_give_no_token_are_refused():
    model = char_bpe.train(["ab ab"], vocab_size=9)
    for merge in ([0, 0], [0, 99], [-1, 0]):
        with pytest.raises(ValueError, match="gives no token"):
            dataclasses.replace(model, merges=np.array([merge]))
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(model, merges=np.concatenate([model.merges] * 2))


def test_training_on_nothing_gives_the_special_tokens():
    model = char_bpe.train(["", " "], vocab_size=5, special_tokens=["<s>"])
    assert model.vocab_size == 1
    assert model.encode(" \n") == []


def test_the_cache_is_bounded_and_no_part_of_the_value(monkeypatch):
    model = char_bpe.train(["ab ab"], vocab_size=9)
    monkeypatch.setattr(char_bpe, "_CACHED_WORDS", 10)
    for i in range(1, 60):
        model.encode("a" * i + "b")
    assert len(vars(model)["_known"]) <= 10
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model
    assert not vars(copy)["_known"]


def test_time_grows_nearly_linearly_with_the_length_of_a_word():
    model = char_bpe.train(["abab baba abba aab"], vocab_size=30)
    times = []
    for size in (5_000, 40_000):
        word = "".join(random.Random(0).choices("ab", k=size))
        start = time.process_time()
        ids = model.encode(word)
        times.append(time.process_time() - start)
        assert model.decode(ids) == word
    assert times[1] < 24 * times[0]  # 8 if linear, 64 if quadratic
