"""Training of WordPiece: a plain reference gives the same vocabulary, scores do what they say."""

import collections
import lzma
import math
import random

import pytest

from jaxformer.tokenizers import bert_text
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.wordpiece_training import frequency, likelihood, ratio, train

PLAIN = {
    likelihood: lambda pair, left, right, total: pair * math.log(total * pair / (left * right)),
    ratio: lambda pair, left, right, total: pair / (left * right),
    frequency: lambda pair, left, right, total: pair,
}


def strings(tokenizer):
    return [token for token in tokenizer.tokens if token is not None]


def reference(texts, size, min_frequency, score):
    """Merges one pair at a time, all anew before each; leaves special tokens out."""
    cutter = bert_text.Cutter(BertText())
    words = collections.Counter(word for text in texts for word in cutter.words(text))
    letters = sorted({letter for word in words for letter in word})
    vocabulary = letters + ["##" + x for x in letters if x not in "!-." and not "一" <= x <= "鿿"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    cut = {word: [word[0], *("##" + x for x in word[1:])] for word in words}
    while len(vocabulary) < size:
        pieces, pairs = collections.Counter(), collections.Counter()
        for word, count in words.items():
            pieces.update({piece: cut[word].count(piece) * count for piece in set(cut[word])})
            for pair in zip(cut[word], cut[word][1:]):
                pairs[pair] += count
        total = pieces.total()
        scores = {
            pair: score(count, pieces[pair[0]], pieces[pair[1]], total)
            for pair, count in pairs.items()
            if count >= max(min_frequency, 1)
        }
        highest = max(scores.values(), default=0)
        if highest <= 0:
            break
        best = [pair for pair in scores if scores[pair] >= highest * (1 - 1e-12)]
        left, right = min(best, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        for word, old in cut.items():
            new, i = [], 0
            while i < len(old):
                both = old[i : i + 2] == [left, right]
                new.append(left + right[2:] if both else old[i])
                i += 2 if both else 1
            cut[word] = new
        assert left + right[2:] not in ids, "a piece came from a second pair"
        ids[left + right[2:]] = len(vocabulary)
        vocabulary.append(left + right[2:])
    return vocabulary


def corpus(seed, letters, words, longest):
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(letters, k=draw.randint(1, longest))) for _ in range(words)]
    weights = [1 / (i + 1) for i in range(words)]
    return [" ".join(draw.choices(lexicon, weights, k=40)) for _ in range(5)]


@pytest.mark.parametrize("score", PLAIN)
@pytest.mark.parametrize("min_frequency", [1, 4])
@pytest.mark.parametrize(
    ("letters", "words", "longest"), [("ab", 30, 9), ("abcde", 60, 7), ("aé!漢字xyzwvu", 60, 6)]
)
def test_the_vocabulary_is_that_of_a_plain_reference(score, min_frequency, letters, words, longest):
    for seed in range(4):
        texts = corpus(seed, letters, words, longest)
        trained = train(texts, vocab_size=70, min_frequency=min_frequency, score=score)
        assert strings(trained) == reference(texts, 65, min_frequency, PLAIN[score])


def test_training_ends_where_no_merge_raises_the_likelihood():
    """`xa` is frequent enough, but rarer than its parts would be side by side by chance."""
    others = "bcdefghijklmnopqrstuvw"
    texts = ["xa " * 5, *(f"x{other} {other}a " * 4 for other in others)]
    for score, merged in ((likelihood, False), (ratio, True), (frequency, True)):
        trained = strings(train(texts, vocab_size=1000, min_frequency=5, score=score))
        assert trained == reference(texts, 995, 5, PLAIN[score])
        assert ("xa" in trained) == merged


def test_runs_of_one_letter_are_merged_from_the_left():
    texts = corpus(0, "a", 30, 30) + corpus(1, "aaab", 60, 20)
    for score in PLAIN:
        trained = train(texts, vocab_size=160, min_frequency=1, score=score)
        assert strings(trained) == reference(texts, 155, 1, PLAIN[score])


def test_the_order_of_texts_and_their_number_do_not_matter():
    texts = corpus(3, "abcdefgh", 80, 8)
    once = train(texts, vocab_size=120)
    assert train(texts[::-1], vocab_size=120) == once
    assert train([" ".join(texts)], vocab_size=120) == once
    assert train(iter(texts), vocab_size=120) == once


def test_a_smaller_vocabulary_is_the_start_of_a_larger_one():
    texts = corpus(4, "abcdefgh", 80, 8)
    large, small = (strings(train(texts, vocab_size=size, min_frequency=1)) for size in (120, 60))
    assert large[: len(small)] == small
    assert len(small) == 55


def test_words_of_known_characters_are_never_unknown():
    trained = train(["ab cd! 漢a"], vocab_size=200)
    assert trained.unknown_id not in trained.encode("dcba abcd d!漢漢 bcda")
    assert trained.unknown_id in trained.encode("abe")
    assert not {"##漢", "##!"} & set(trained.tokens)
    assert "##a" in trained.tokens


def test_the_rarest_characters_are_left_out_with_their_words():
    texts = ["aab aab bbz"]
    assert strings(train(texts, vocab_size=9, max_alphabet=2)) == ["a", "b", "##a", "##b"]
    assert "bbz" not in strings(train(texts, vocab_size=90, max_alphabet=2, min_frequency=1))
    assert "bbz" in strings(train(texts, vocab_size=90, min_frequency=1))


def test_words_over_the_limit_are_left_out():
    trained = train(["abcdef " * 9], vocab_size=50, max_characters=5)
    assert strings(trained) == []
    assert trained.encode("abcdef") == [trained.unknown_id]


def test_no_texts_give_special_tokens_alone():
    trained = train([], vocab_size=50)
    assert trained.vocab_size == 5
    assert trained.encode("a") == [trained.unknown_id]


def test_what_cannot_be_trained_is_named():
    with pytest.raises(ValueError, match=r"vocab_size=8 is smaller .* 4 characters"):
        train(["ab"], vocab_size=8)
    with pytest.raises(ValueError, match="repeat"):
        train(["ab"], vocab_size=80, special_tokens=("[UNK]", "[UNK]"))
    with pytest.raises(ValueError, match="got one str"):
        train("ab", vocab_size=80)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        train(["ab"], vocab_size=80, max_alphabet=0)
    with pytest.raises(ValueError, match=r"U\+D800"):
        train(["a\ud800"], vocab_size=80)
    with pytest.raises(ValueError, match=r"\[UNK\]"):
        train(["ab"], vocab_size=80, special_tokens=())


def test_progress_ends_with_all_that_was_wanted():
    calls = []
    train(
        corpus(5, "abcdefgh", 300, 8),
        vocab_size=400,
        min_frequency=1,
        progress=lambda done, wanted: calls.append((done, wanted)),
    )
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert {wanted for _, wanted in calls} == {400 - 5 - 16}
    assert calls[-1][0] == calls[-1][1]


def test_the_literal_score_is_useless_without_a_minimum_and_likelihood_is_not(real_data):
    """Words of held-out English take the fewest tokens by likelihood, the most by the ratio."""
    with lzma.open(real_data / "corpus" / "english_10mb.nul.xz") as file:
        documents = file.read(1_000_000).decode(errors="ignore").split("\0")
    held = documents[1::10]
    texts = [text for i, text in enumerate(documents) if i % 10 != 1]
    words = sum(len(text.split()) for text in held)

    def tokens_per_word(score, min_frequency):
        trained = train(texts, vocab_size=3000, score=score, min_frequency=min_frequency)
        return sum(map(len, trained.encode_batch(held))) / words

    good, bare, floored = (
        tokens_per_word(*case) for case in ((likelihood, 5), (ratio, 1), (ratio, 50))
    )
    assert good < floored < bare
    assert bare > 2 * good
