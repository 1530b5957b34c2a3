"""Ranks: the merges behind them, the ids of `tiktoken`, and files that are malformed."""

import base64
import gzip
import itertools
import json
import random

import numpy as np
import pytest

from jaxformer.tokenizers import bpe, formats, patterns, tiktoken_ranks
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.tiktoken_merges import merges_of_ranks

BYTES = [bytes([i]) for i in range(256)]
WHOLE = Pattern(r"[\s\S]+")
PUBLISHED = ("r50k_base", "cl100k_base", "o200k_base")


def written(tokens, first: int = 0) -> bytes:
    lines = (base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens, start=first))
    return b"".join(lines)


def vocabularies(number, trained):
    """Bytes and some longer tokens: joined from earlier ones as training does, or at random."""
    for seed in range(number):
        rng = random.Random(seed)
        letters = [bytes([c]) for c in b"abc"[: rng.randrange(1, 4)]]
        pool, tokens = list(letters), []
        for _ in range(rng.randrange(1, 25)):
            token = b"".join(rng.choices(letters, k=rng.randrange(2, 7)))
            if trained:
                token = rng.choice(pool) + rng.choice(pool)
            if token not in tokens and len(token) < 60:
                tokens.append(token)
                pool.append(token)
        yield rng, letters, [*BYTES, *tokens]


def parts_by_lower_ranks(tokens, rank):
    """Merges the bytes of a token by ranks below its own, one pair at a time."""
    ranks = {token: i for i, token in enumerate(tokens[:rank])}
    parts = [tokens[rank][i : i + 1] for i in range(len(tokens[rank]))]
    while True:
        joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        if not joined or min(joined) == rank:
            return parts
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("trained", [True, False])
def test_the_merge_of_a_token_is_what_lower_ranks_arrive_at(trained):
    single = 0
    for _, _, tokens in vocabularies(60, trained):
        pairs, unreached = merges_of_ranks(tokens)
        ways = {}
        for left, right in pairs.tolist():
            ways.setdefault(tokens[left] + tokens[right], []).append([tokens[left], tokens[right]])
        for rank in range(256, len(tokens)):
            if rank not in unreached:
                assert ways[tokens[rank]] == [parts_by_lower_ranks(tokens, rank)]
                single += 1
    assert single > 100


@pytest.mark.parametrize("trained", [True, False])
def test_ids_are_those_of_tiktoken_for_any_list_of_tokens(trained):
    tiktoken = pytest.importorskip("tiktoken")
    for rng, letters, tokens in vocabularies(30, trained):
        ours = tiktoken_ranks.parse(written(tokens), pattern=WHOLE, special_tokens={})
        ranks = {token: i for i, token in enumerate(tokens)}
        theirs = tiktoken.Encoding(
            "", pat_str=WHOLE.regex, mergeable_ranks=ranks, special_tokens={}
        )
        for _ in range(30):
            text = b"".join(rng.choices(letters, k=rng.randrange(1, 40))).decode()
            assert ours.encode(text) == theirs.encode(text), (tokens[256:], text)


def test_a_word_that_merges_never_reach_is_still_its_token():
    tokens = [*BYTES, b"abc", b"bc"]  # bc would have to be merged first
    ours = tiktoken_ranks.parse(written(tokens), pattern=patterns.GPT2, special_tokens={})
    assert ours.whole_words
    assert ours.encode("abc") == [256]


def test_a_rank_may_be_missing_if_it_is_a_special_token():
    data = written([*BYTES, b"ab"]) + written([b"abc"], first=258)
    with pytest.raises(ValueError, match="the rank 257 is missing"):
        tiktoken_ranks.parse(data, pattern=WHOLE, special_tokens={"<s>": 300})
    ours = tiktoken_ranks.parse(data, pattern=WHOLE, special_tokens={"<s>": 257})
    assert ours.encode("<s>abc", allow_special=["<s>"]) == [257, 258]


def test_what_is_written_is_read_back_and_is_what_tiktoken_reads(tmp_path):
    load = pytest.importorskip("tiktoken.load")
    ours = bpe.train(["low lower lowest, newer newest"] * 3, vocab_size=300)
    data = written([token for token in ours.tokens if token])
    assert tiktoken_ranks.serialize(ours) == data
    assert tiktoken_ranks.parse(data, pattern=ours.pattern, special_tokens={}) == ours
    path = tmp_path / f"{random.randrange(1 << 60)}.tiktoken"  # it caches by the path
    path.write_bytes(data)
    ranks = load.load_tiktoken_bpe(str(path))
    assert ranks == {token: i for i, token in enumerate(ours.tokens)}


def test_merges_that_ranks_cannot_say_are_not_written():
    tokens = (*BYTES, b"ab", b"bc")
    late_first = bpe.Bpe(tokens=tokens, merges=np.array([[98, 99], [97, 98]]))
    missing = bpe.Bpe(tokens=(*BYTES, b"ab", b"abc"), merges=np.array([[97, 98]]))
    for tokenizer in (late_first, missing):
        with pytest.raises(ValueError, match="cannot be written as ranks: its merges"):
            tiktoken_ranks.serialize(tokenizer)
    never = bpe.Bpe(tokens=(*BYTES, b"abcd"), merges=np.zeros((0, 2), np.int32))
    with pytest.raises(ValueError, match="never makes some of its tokens"):
        tiktoken_ranks.serialize(never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"YWI=", "line 257 is not a token and its rank: 'YWI='"),
        (b"YWI= 256 7", "line 257 is not a token and its rank"),
        (b"Y*I= 256", "line 257 holds no base64"),
        (b"YWI 256", "line 257 holds no base64"),
        (b"YWI= x", "line 257 holds no rank"),
        (b"YWI= -1", "line 257 holds no rank"),
        (b"YWI= 99999999999999999999", "line 257 holds no rank"),
        (b"YWI= 5", "the rank 5 is there twice, as entry 6 and 257"),
        (b"YQ== 256", "the token b'a' is there twice, as entry 98 and 257"),
        (b"YWI= 999999999", "the rank 256 is missing"),
        (b"YWI=\n256", "line 257"),
    ],
)
def test_a_malformed_line_is_named(change, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        tiktoken_ranks.parse(written(BYTES) + change, pattern=WHOLE, special_tokens={})


def test_every_byte_needs_a_rank_and_a_file_a_line():
    with pytest.raises(ValueError, match=r"the byte b'\\xff' has no rank"):
        tiktoken_ranks.parse(written(BYTES[:255]), pattern=WHOLE, special_tokens={})
    with pytest.raises(ValueError, match="empty"):
        tiktoken_ranks.parse(b"\n \n", pattern=WHOLE, special_tokens={})


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_ranks_give_the_golden_ids_and_those_of_tiktoken(published, real_data):
    tiktoken = pytest.importorskip("tiktoken")
    folder = real_data / "vocab/tiktoken"
    ours = formats.load(folder / f"{published}.tiktoken.gz")
    assert not ours.whole_words
    kept = json.loads((folder / "patterns.json").read_text())[published]
    assert ours.special_tokens == kept["special_tokens"]
    assert ours.vocab_size == kept["n_vocab"]
    name = "gpt2" if published == "r50k_base" else published
    for entry in json.loads((real_data / "vocab/golden_dev.json").read_text()):
        assert ours.encode(entry["text"]) == entry[name]
        assert ours.decode(entry[name]) == entry["text"]
    theirs = tiktoken.Encoding(
        "",
        pat_str=kept["pat_str"],
        mergeable_ranks={token: i for i, token in enumerate(ours.tokens) if token is not None},
        special_tokens=kept["special_tokens"],
    )
    rng = random.Random(0)
    for _ in range(300):
        codes = (rng.randrange(rng.choice((0x80, 0x250, 0x3000, 0x110000))) for _ in range(30))
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        text += rng.choice(("\n  ", " x'LL 1234567  y", "  \r\n\n z", "", "<|endoftext|>"))
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), text
        assert ours.decode(ids) == text
    if published == "r50k_base":
        original = gzip.decompress((folder / "r50k_base.tiktoken.gz").read_bytes())
        assert tiktoken_ranks.serialize(ours).split() == original.split()
