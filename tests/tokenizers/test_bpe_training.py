"""Training: against a plain trainer and, tie for tie, against `BpeTrainer`."""

import collections
import itertools
import json
import random

import pytest

from jaxformer.tokenizers import bpe, bpe_training, byte_alphabet, patterns

SAMPLES = ("ab", "a", "abc", "abcdefgh ", "ab ", "aé日 ", "ab\n 's1", "the cat sat on a mat. ")


def corpus(seed: int) -> list[str]:
    """Texts over a small alphabet, so that counts tie and runs overlap."""
    rng = random.Random(seed)
    letters, longest = rng.choice(SAMPLES), rng.choice([20, 200])
    return ["".join(rng.choices(letters, k=rng.randrange(longest))) for _ in range(20)]


def plainly(texts: list[str], wanted: int, least: int, pattern: patterns.Pattern) -> list[tuple]:
    """One merge at a time, all counted anew: what training means."""
    index = {byte: i for i, byte in enumerate(byte_alphabet.order())}
    counts = collections.Counter(word for text in texts for word in pattern.split(text))
    words = {word: [index[byte] for byte in word.encode()] for word in counts}
    merges = []
    while len(merges) < wanted:
        pairs = collections.Counter()
        for word, ids in words.items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < max(least, 1):
            break
        for ids in words.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [256 + len(merges)]
                i += 1
        merges.append(best)
    return merges


@pytest.mark.parametrize("seed", range(24))
def test_merges_are_those_of_one_at_a_time(seed):
    texts, least = corpus(seed), seed % 4
    for pattern in (patterns.GPT2, patterns.O200K, patterns.Pattern(r"\S+")):
        found = bpe.train(texts, vocab_size=256 + 80, min_frequency=least, pattern=pattern)
        assert found.merges.tolist() == [list(m) for m in plainly(texts, 80, least, pattern)]


def hugging_face(texts, vocab_size, least, special, pattern) -> tuple[dict, list]:
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(pattern.regex), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=least,
        special_tokens=special,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(texts, trainer)
    model = json.loads(other.to_str())["model"]
    vocab = model["vocab"]
    return vocab, [[vocab[left], vocab[right]] for left, right in model["merges"]]


@pytest.mark.parametrize("seed", range(40))
def test_vocabulary_and_merges_are_those_of_hugging_face(seed):
    texts, rng = corpus(seed + 100), random.Random(seed)
    pattern = rng.choice([patterns.GPT2, patterns.CL100K, patterns.O200K])
    special = rng.choice([[], ["<s>", "<pad>"]])
    size, least = 258 + rng.randrange(300), rng.randrange(4)
    found = bpe.train(
        texts, vocab_size=size, min_frequency=least, special_tokens=special, pattern=pattern
    )
    vocab, merges = hugging_face(texts, size, least, special, pattern)
    assert found.merges.tolist() == merges
    stand_in = dict(zip(byte_alphabet.order(), sorted(c for c in vocab if len(c) == 1)))
    spelled = {
        "".join(stand_in[byte] for byte in token): i
        for i, token in enumerate(found.tokens)
        if token is not None
    }
    assert spelled | dict(found.special_tokens) == vocab


def test_real_text_gives_the_merges_of_hugging_face(real_data):
    import gzip

    text = gzip.decompress((real_data / "text/tinyshakespeare.txt.gz").read_bytes()).decode()
    texts = [text[i : i + 9000] for i in range(0, len(text), 9000)]
    for pattern in (patterns.GPT2, patterns.CL100K):
        found = bpe.train(texts, vocab_size=4000, pattern=pattern)
        assert found.merges.tolist() == hugging_face(texts, 4000, 0, [], pattern)[1]


def test_one_training_holds_every_smaller_vocabulary():
    texts = corpus(14) + corpus(16) + corpus(20)
    large = bpe.train(texts, vocab_size=400, special_tokens=["<s>"])
    for size in (257, 258, 300, 399, 400):
        assert large.truncate(size) == bpe.train(texts, vocab_size=size, special_tokens=["<s>"])
    with pytest.raises(ValueError, match="leaves out the byte"):
        large.truncate(200)
    with pytest.raises(ValueError, match="1 to 400 tokens, got 401"):
        large.truncate(401)


def test_the_order_of_the_texts_does_not_matter():
    texts = corpus(8)
    assert bpe.train(texts, vocab_size=350) == bpe.train(texts[::-1], vocab_size=350)


def test_counts_beyond_the_order_s_bits_are_still_exact(monkeypatch):
    texts = corpus(3)
    expected = bpe.train(texts, vocab_size=336)
    monkeypatch.setattr(bpe_training._State, "most", 6)
    assert bpe.train(texts, vocab_size=336) == expected


def test_few_texts_give_fewer_tokens_than_wanted():
    assert bpe.train(["ab"], vocab_size=1000).vocab_size == 257
    assert bpe.train([], vocab_size=1000).vocab_size == 256
    assert bpe.train(["", ""], vocab_size=256).encode("ab") == [64, 65]


def test_special_tokens_come_first_and_are_not_looked_for_in_texts():
    found = bpe.train(["see <see> see"] * 9, vocab_size=300, special_tokens=["see", "<s>"])
    assert dict(found.special_tokens) == {"see": 0, "<s>": 1}
    assert found.tokens[:2] == (None, None)
    assert b"see" in found.tokens
    assert 0 not in found.encode("see")


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"vocab_size=257 .* 2 special tokens and 256 bytes need 258"
    ):
        bpe.train(["a"], vocab_size=257, special_tokens=["<s>", "</s>"])
    with pytest.raises(ValueError, match="repeat: '<s>'"):
        bpe.train(["a"], vocab_size=300, special_tokens=["<s>", "<s>"])
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        bpe.train(["a\ud800"], vocab_size=300)


def test_progress_tells_the_merges_made_and_ends_at_its_goal():
    told = []
    bpe.train(corpus(9), vocab_size=500, progress=lambda done, wanted: told.append((done, wanted)))
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_paths_are_read_as_documents(tmp_path):
    (tmp_path / "a.txt").write_text("aé日 " * 9)
    assert bpe.train([tmp_path / "a.txt", "b"], vocab_size=300) == bpe.train(
        ["aé日 " * 9, "b"], vocab_size=300
    )
    (tmp_path / "bad.txt").write_bytes(b"fine\nbad \xff")
    with pytest.raises(ValueError, match=r"bad.txt is no UTF-8: line 2, byte 9"):
        bpe.train([tmp_path / "bad.txt"], vocab_size=300)
    with pytest.raises(ValueError, match="several texts, got one str"):
        bpe.train("abc", vocab_size=300)
