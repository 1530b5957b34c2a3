"""`tokenizer.json`, the layout of Hugging Face's `tokenizers`: what all models share, and BPE.

Ids are those that the other library gives with `add_special_tokens=False`. What it adds around a
text (`post_processor`) or does to the ids afterwards (`truncation`, `padding`) is dropped on
reading. Added tokens, special or not, become special tokens: there they are cut out of every text,
here only where a call allows it. Whatever else would change ids and has no counterpart is a
ValueError.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.tokenizers import byte_alphabet, hf_patterns
from jaxformer.tokenizers.bpe import Bpe

MAX_TOKENS = 1 << 21


def bpe_to_json(tokenizer: Bpe) -> dict[str, Any]:
    """Writes byte-level BPE.

    Raises:
        ValueError: If a special token is spelled as an ordinary one is, or the pattern holds what
            the other library reads otherwise.
    """
    ids = [i for i, token in enumerate(tokenizer.tokens) if token is not None]
    texts = byte_alphabet.write([tokenizer.tokens[i] or b"" for i in ids])
    text_of = dict(zip(ids, texts))
    vocab = dict(zip(texts, ids))
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return document(
        tokenizer.special_tokens,
        pre_tokenizer=hf_patterns.write(tokenizer.pattern),
        decoder={"type": "ByteLevel", **byte_level},
        model=bpe_model(
            vocab,
            [f"{text_of[a]} {text_of[b]}" for a, b in tokenizer.merges.tolist()],
            ignore_merges=tokenizer.whole_words,
        ),
    )


def bpe_from_json(value: Mapping[str, Any]) -> Bpe:
    """Reads byte-level BPE; raises ValueError as the module says."""
    model = value["model"]
    refuse(value.get("normalizer"), "normalizer")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{name} = {model[name]!r} is not supported in byte-level BPE")
    if model.get("dropout"):
        raise ValueError(f"dropout = {model['dropout']} is not supported: ids would be random")
    pattern = hf_patterns.read(value.get("pre_tokenizer"))
    vocab = vocabulary(model)
    specials = added_tokens(value, vocab)
    ordinary = {text: i for text, i in vocab.items() if text not in specials}
    texts, ids = list(ordinary), list(ordinary.values())
    tokens: list[bytes | None] = [None] * (1 + max(ids, default=-1))
    for i, token in zip(ids, byte_alphabet.read(texts)):
        tokens[i] = token
    if sum(map((1).__eq__, map(len, texts))) < 256:  # else every byte has a token
        for name in ("unk_token", "byte_fallback"):
            if model.get(name):
                raise ValueError(f"{name} = {model[name]!r} is not supported in byte-level BPE")
    return Bpe(
        tokens=tuple(tokens),
        merges=merge_ids(model, vocab, specials),
        pattern=pattern,
        special_tokens=specials,
        whole_words=bool(model.get("ignore_merges")),
    )


# Shared with the other models.


def document(
    special_tokens: Mapping[str, int],
    *,
    pre_tokenizer: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
    model: Mapping[str, Any],
    normalizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The frame of a `tokenizer.json`; special tokens stand in the vocabulary too.

    Raises:
        ValueError: If a special token is spelled as an ordinary one is.
    """
    vocab = dict(model["vocab"])
    for name, token in special_tokens.items():
        # Without an entry of its own the other library would number it by itself.
        if vocab.setdefault(name, token) != token:
            raise ValueError(
                f"tokenizer.json cannot hold the special token {name!r}: the ordinary token "
                f"{vocab[name]} is spelled the same."
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(special_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {**model, "vocab": dict(sorted(vocab.items(), key=lambda item: item[1]))},
    }


def added(special_tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """The `added_tokens` of special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token, "content": name, **flags, "special": True}
        for name, token in sorted(special_tokens.items(), key=lambda item: item[1])
    ]


def bpe_model(
    vocab: Mapping[str, int],
    merges: Sequence[str] | Sequence[Sequence[str]],
    *,
    unknown: str | None = None,
    end_of_word: str | None = None,
    byte_fallback: bool = False,
    fuse_unknown: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The `model` of a BPE; merges are pairs, or "left right" where no token holds a space."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": end_of_word,
        "fuse_unk": fuse_unknown,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """The checked `vocab` of a model."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError("model.vocab is missing or no object")
    if not vocab:
        raise ValueError("model.vocab is empty")
    if set(map(type, vocab.values())) != {int}:
        text = next(text for text, i in vocab.items() if type(i) is not int)
        raise ValueError(f"model.vocab gives {text!r} the id {vocab[text]!r:.50}")
    if len(set(vocab.values())) < len(vocab):
        seen: dict[int, str] = {}
        for text, i in vocab.items():
            if seen.setdefault(i, text) != text:
                raise ValueError(f"model.vocab gives {seen[i]!r} and {text!r} the id {i}")
    for text, i in ((text, i) for text, i in vocab.items() if not 0 <= i < MAX_TOKENS):
        raise ValueError(f"model.vocab gives {text!r} the id {i}; ids are 0 to {MAX_TOKENS - 1}")
    if "" in vocab:
        raise ValueError("model.vocab holds an empty token")
    return vocab


def merge_ids(
    model: Mapping[str, Any], vocab: Mapping[str, int], specials: Mapping[str, int]
) -> np.ndarray:
    """The checked `merges` of a model as ids (M, 2)."""
    merges = _merges(model)
    if not merges:
        return np.zeros((0, 2), np.int32)
    try:
        lefts, rights = _sides(merges)
        pairs = np.array([[vocab[left] for left in lefts], [vocab[right] for right in rights]])
        results = [vocab[made] for made in map(operator.add, lefts, rights)]
    except (KeyError, TypeError, ValueError):
        raise _bad_merge(merge_pairs(model), vocab) from None
    if np.unique(pairs[0] << 32 | pairs[1]).size < len(merges):
        seen: dict[tuple[str, str], int] = {}
        for i, (left, right) in enumerate(zip(lefts, rights)):
            if (j := seen.setdefault((left, right), i)) != i:
                raise ValueError(f"model.merges[{i}], {left!r} and {right!r}, is also merge {j}")
    special = np.array(list(specials.values()), np.int64)
    for name in np.array(list(specials), object)[np.isin(special, np.append(pairs, results))]:
        raise ValueError(f"the added token {name!r} is also part of a merge")
    return pairs.T.astype(np.int32)


def _sides(merges: list[Any]) -> tuple[Sequence[str], Sequence[str]]:
    """The left and the right token of each merge: pairs, or strings with a space between."""
    kinds = set(map(type, merges))
    if kinds == {str} and set(map(str.count, merges, itertools.repeat(" "))) == {1}:
        tokens = " ".join(merges).split(" ")
        return tokens[::2], tokens[1::2]
    if kinds != {list}:
        raise ValueError("mixed")
    lefts, rights = zip(*merges, strict=True)
    return lefts, rights


def merge_pairs(model: Mapping[str, Any]) -> list[Any]:
    """The `merges` of a model as pairs; they may also be strings with a space between."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in _merges(model)]


def _merges(model: Mapping[str, Any]) -> list[Any]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("model.merges is missing or no list")
    return merges


def _bad_merge(merges: Sequence[Any], vocab: Mapping[str, int]) -> ValueError:
    for i, merge in enumerate(merges):
        if not isinstance(merge, list) or list(map(type, merge)) != [str, str]:
            return ValueError(f"model.merges[{i}] is no pair of tokens: {merge!r:.80}")
        for token in (*merge, "".join(merge)):
            if token not in vocab:
                return ValueError(
                    f"model.merges[{i}], {merge[0]!r} and {merge[1]!r}, needs the token {token!r}, "
                    "which is not in model.vocab"
                )
    return ValueError("model.merges is malformed")


def added_tokens(value: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, int]:
    """The checked `added_tokens`: name and id of each."""
    entries = value.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("added_tokens is no list of objects")
    names = {i: text for text, i in vocab.items()} if entries else {}
    specials: dict[str, int] = {}
    for entry in entries:
        name, token = entry.get("content"), entry.get("id")
        if not isinstance(name, str) or not name or type(token) is not int:
            raise ValueError(f"added_tokens holds no token and id: {entry!r:.100}")
        if not 0 <= token < MAX_TOKENS:
            raise ValueError(f"the added token {name!r} has the id {token}")
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag):
                raise ValueError(f"{flag} of the added token {name!r} is not supported")
        if vocab.get(name, token) != token or names.setdefault(token, name) != name:
            raise ValueError(f"the added token {name!r} has the id {token} of {names[token]!r}")
        if specials.setdefault(name, token) != token:
            raise ValueError(f"the added token {name!r} has the ids {specials[name]} and {token}")
    return specials


def refuse(part: Any, name: str) -> None:
    """Raises ValueError if a part of the pipeline that would change ids is there."""
    if part in (None, {"type": "Sequence", f"{name}s": []}):
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "Sequence" and isinstance(part, dict):
        kinds = [entry.get("type") for entry in part.get(f"{name}s", [])]
        kind = f"Sequence of {', '.join(map(str, kinds))}"
    raise ValueError(f"the {name} {kind!r} is not supported for this model")
