"""`.tiktoken` files: base64 of each token and its rank, which is its priority and its id."""

import binascii
import contextlib
from collections.abc import Mapping

import numpy as np

from jaxformer.tokenizers import patterns
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.tiktoken_merges import merges_of_ranks


def published(name: str) -> tuple[Pattern, dict[str, int]] | None:
    """The pattern and special tokens that go with a published file, by its name without endings.

    References:
        https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py (0.14)
    """
    end = {"<|endoftext|>": 50256}
    middle = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
    known = {
        "r50k_base": (patterns.GPT2, end),
        "p50k_base": (patterns.GPT2, end),
        "cl100k_base": (
            patterns.CL100K_TIKTOKEN,
            {"<|endoftext|>": 100257, **middle, "<|endofprompt|>": 100276},
        ),
        "o200k_base": (patterns.O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    }
    return known.get(name)


def parse(data: bytes, *, pattern: Pattern, special_tokens: Mapping[str, int]) -> Bpe:
    """Reads ranks; the pattern and the special tokens are not in the file.

    Raises:
        ValueError: If a line is not base64, a space and a rank, a token or a rank is there twice,
            a rank is missing that is no special token's, or a single byte has no rank.
    """
    tokens, ranks = _read(data)
    if len(set(tokens)) < len(tokens):
        raise _twice("token", tokens)
    if len(set(ranks)) < len(ranks):
        raise _twice("rank", ranks)
    number = max(ranks) + 1
    if number > len(ranks):
        given = {*ranks, *special_tokens.values()}
        missing = next((i for i in range(number) if i not in given), None)
        if missing is not None:
            raise ValueError(f"the rank {missing} is missing, and is no special token's")
    missing_bytes = set(map(bytes, zip(range(256)))) - {t for t in tokens if len(t) == 1}
    if missing_bytes:
        raise ValueError(f"the byte {min(missing_bytes)!r} has no rank")
    order = np.argsort(np.array(ranks))
    by_rank = [tokens[i] for i in order.tolist()]
    pairs, unreached = merges_of_ranks(by_rank)
    ids = np.array(ranks, np.int32)[order]
    by_id: list[bytes | None] = [None] * number
    for token, rank in zip(tokens, ranks):
        by_id[rank] = token
    return Bpe(
        tokens=tuple(by_id),
        merges=ids[pairs],
        pattern=pattern,
        special_tokens=special_tokens,
        # The library looks a word up before it merges anything.
        whole_words=bool(unreached.size),
    )


def serialize(tokenizer: Bpe) -> bytes:
    """Writes the ranks; the special tokens and the pattern are lost and have to be kept elsewhere.

    Raises:
        ValueError: If the file would not give the same ids back, because the order of the merges
            is not the order of the ids, or single bytes have none.
    """
    lines = [
        binascii.b2a_base64(token, newline=False) + b" %d\n" % i
        for i, token in enumerate(tokenizer.tokens)
        if token is not None
    ]
    data = b"".join(lines)
    try:
        again = parse(data, pattern=tokenizer.pattern, special_tokens=tokenizer.special_tokens)
    except ValueError as error:
        raise ValueError(f"This tokenizer cannot be written as ranks: {error}.") from None
    if not np.array_equal(again.merges, tokenizer.merges):
        raise ValueError(
            "This tokenizer cannot be written as ranks: its merges are not in the order of the ids "
            "that they give."
        )
    if again.whole_words and not tokenizer.whole_words:
        raise ValueError(
            "This tokenizer cannot be written as ranks: it never makes some of its tokens, which "
            "reading by ranks would."
        )
    return data


def _read(data: bytes) -> tuple[list[bytes], list[int]]:
    """Takes the lines apart, all at once if nothing is wrong with any."""
    rows = [row for line in data.split(b"\n") if (row := line.split())]
    if not rows:
        raise ValueError("the file is empty")
    if set(map(len, rows)) == {2}:
        words, numbers = zip(*rows)
        with contextlib.suppress(binascii.Error):
            tokens = [binascii.a2b_base64(word, strict_mode=True) for word in words]
            if all(tokens) and all(map(bytes.isdigit, numbers)) and max(map(len, numbers)) < 10:
                return tokens, list(map(int, numbers))
    for i, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            _check_line(i, line.split())
    raise ValueError("the lines are no ranks")


def _check_line(i: int, words: list[bytes]) -> None:
    text = b" ".join(words)[:60].decode("utf-8", "replace")
    if len(words) != 2:
        raise ValueError(f"line {i} is not a token and its rank: {text!r}")
    try:
        token = binascii.a2b_base64(words[0], strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"line {i} holds no base64 ({error}): {text!r}") from None
    if not token:
        raise ValueError(f"line {i} holds an empty token")
    if not words[1].isdigit() or len(words[1]) >= 10:
        raise ValueError(f"line {i} holds no rank: {text!r}")


def _twice(what: str, values: list) -> ValueError:
    seen: dict = {}
    for i, value in enumerate(values, start=1):
        if value in seen:
            return ValueError(
                f"the {what} {value!r} is there twice, as entry {seen[value]} and {i}"
            )
        seen[value] = i
    return ValueError(f"a {what} is there twice")
