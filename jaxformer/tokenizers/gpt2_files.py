"""GPT-2's two files: a vocabulary in JSON and the merges, one a line, in order of priority."""

import json
from collections.abc import Mapping
from typing import Any

from jaxformer.tokenizers import byte_alphabet, hf_json, patterns, tokenizer
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.patterns import Pattern

VOCABULARY_NAMES = ("vocab.json", "encoder.json")
MERGES_NAMES = ("merges.txt", "vocab.bpe")

_HEADER = "#version: 0.2"


def parse(
    vocab: Any,
    merges: bytes,
    *,
    pattern: Pattern | None = None,
    special_tokens: Mapping[str, int] | None = None,
) -> Bpe:
    """Reads a vocabulary and merges of byte-level BPE.

    Args:
        vocab: The parsed vocabulary.
        merges: The file of merges; a first line that begins with `#version` is skipped.
        pattern: How text is cut, which neither file says; GPT-2's if None.
        special_tokens: Names and ids; if None, the tokens in `<..>` or `[..]` that no merge makes
            are taken for such, as GPT-2's `<|endoftext|>` is.

    Raises:
        ValueError: If a line is no merge or is there twice, a merge needs a token that the
            vocabulary lacks, or a token is not written in GPT-2's characters for bytes. If
            `special_tokens` is None also if no merge makes another token than such a one.
    """
    pairs = _pairs(tokenizer.utf8(merges, "the list of merges"))
    vocab = hf_json.vocabulary({"vocab": vocab})
    if special_tokens is None:
        special_tokens = _unmade(vocab, pairs)
    for name, token in special_tokens.items():
        if vocab.get(name, token) != token:
            raise ValueError(f"the special token {name!r} has the id {vocab[name]}, not {token}")
    texts = [text for text in vocab if text not in special_tokens]
    tokens: list[bytes | None] = [None] * (1 + max((vocab[text] for text in texts), default=-1))
    for text, token in zip(texts, byte_alphabet.read(texts)):
        tokens[vocab[text]] = token
    return Bpe(
        tokens=tuple(tokens),
        merges=hf_json.merge_ids({"merges": pairs}, vocab, special_tokens),
        pattern=pattern or patterns.GPT2,
        special_tokens=special_tokens,
    )


def serialize(tokenizer: Bpe) -> tuple[bytes, bytes]:
    """Writes the vocabulary and the merges; the pattern is lost and has to be kept elsewhere.

    Raises:
        ValueError: If words are taken whole, which the files cannot say, or a special token is
            spelled as an ordinary one or as a merge is.
    """
    if tokenizer.whole_words:
        raise ValueError("GPT-2's files cannot say that words are taken whole.")
    model = hf_json.bpe_to_json(tokenizer)["model"]
    lines = [f"{merge}\n" for merge in model["merges"]]
    data = json.dumps(model["vocab"], ensure_ascii=False).encode()
    return data, "".join([f"{_HEADER}\n", *lines]).encode()


def _unmade(vocab: Mapping[str, int], pairs: list[list[str]]) -> dict[str, int]:
    """The tokens that no merge makes, which have to look like special ones."""
    made = {left + right for left, right in pairs}
    found = {text: i for text, i in vocab.items() if len(text) > 1 and text not in made}
    for text in found:
        # An older list of merges beside a vocabulary leaves out its last tokens.
        if text[0] not in "<[" or text[-1] not in ">]":
            raise ValueError(
                f"no merge makes the token {text!r}: the two files do not belong together, or the "
                "special tokens have to be given"
            )
    return found


def _pairs(text: str) -> list[list[str]]:
    """The merges of a file, as pairs; only the end of a line is cut off, not other white space."""
    lines = text.split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    if not lines[-1]:
        lines.pop()
    seen: dict[str, int] = {}
    pairs = []
    for i, line in enumerate(lines[first:], start=first + 1):
        line = line.rstrip("\r")
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"line {i} of the merges is no pair of tokens: {line!r:.80}")
        if seen.setdefault(line, i) != i:
            raise ValueError(f"line {i} of the merges is line {seen[line]} again: {line!r:.80}")
        pairs.append(pair)
    return pairs
