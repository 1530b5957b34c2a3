"""SentencePiece's byte-pair encoding as `tokenizer.json`, laid out as Llama 2's."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from jaxformer.tokenizers import hf_json
from jaxformer.tokenizers.sentencepiece import MARK, Kind, Piece, SentencePieceBpe


def to_json(tokenizer: SentencePieceBpe) -> dict[str, Any]:
    """Writes a `tokenizer.json`.

    Of equal neighbours in line for one piece the other library takes the pair that is listed first
    and not the leftmost, so that ids may differ where a piece can overlap with itself after uneven
    merges; no trained vocabulary is known that does.

    Raises:
        ValueError: If there are user-defined pieces, which the other library cuts out before it
            adds the space in front, or two merged pieces have equal scores, or one is made of parts
            that are no pieces.
    """
    texts = [piece.text for piece in tokenizer.pieces]
    if user_defined := tokenizer._of_kind(Kind.USER_DEFINED):
        raise ValueError(f"tokenizer.json cannot hold user-defined pieces: {list(user_defined)}.")
    scores = {piece.text: piece.score for piece in tokenizer.pieces if piece.kind == Kind.NORMAL}
    merged = sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text])
    for first, second in itertools.pairwise(merged):
        if scores[first] == scores[second]:
            raise ValueError(f"The pieces {first!r} and {second!r} have equal scores.")
    merges = []
    for text in merged:
        pairs = _splits(text, scores)
        if not pairs:
            raise ValueError(f"The piece {text!r} is made of parts that are no pieces.")
        merges.extend(pairs)
    value = hf_json.document(
        {},
        normalizer=_normalizer(tokenizer.add_dummy_prefix, tokenizer.remove_extra_whitespaces),
        pre_tokenizer=None,
        decoder=_decoder(tokenizer.add_dummy_prefix or tokenizer.remove_extra_whitespaces),
        model=hf_json.bpe_model(
            {text: i for i, text in enumerate(texts)},
            merges,
            unknown=texts[tokenizer.unknown_id],
            byte_fallback=tokenizer.byte_fallback,
            fuse_unknown=True,
        ),
    )
    return value | {"added_tokens": hf_json.added(tokenizer.special_tokens)}


def from_json(value: Mapping[str, Any]) -> SentencePieceBpe:
    """Reads such a `tokenizer.json`.

    Scores are not in the file: pieces get those that training gives, falling by one from each
    piece to the next, if this is the order of the merges, and others in that order if not. `<s>`
    and `</s>` begin and end a sequence, if they are among the added tokens.

    Raises:
        ValueError: If it normalises text otherwise, or the merges are not all ways to make each
            piece of two others, piece by piece: then ids depend on more than scores.
    """
    model = value["model"]
    if value.get("pre_tokenizer") is not None:
        raise ValueError("a pre_tokenizer is not supported for SentencePiece's BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"{name} = {model[name]!r} is not supported for SentencePiece's BPE")
    vocab = hf_json.vocabulary(model)
    unknown = model.get("unk_token")
    if unknown not in vocab or not model.get("fuse_unk"):
        raise ValueError(f"SentencePiece's BPE fuses unknown tokens; here unk_token is {unknown!r}")
    specials = hf_json.added_tokens(value, vocab) | {unknown: vocab[unknown]}
    byte_fallback = bool(model.get("byte_fallback"))
    kinds = {f"<0x{byte:02X}>": Kind.BYTE for byte in range(256 if byte_fallback else 0)}
    kinds |= dict.fromkeys(specials, Kind.CONTROL) | {unknown: Kind.UNKNOWN}
    hf_json.merge_ids(model, vocab, specials)
    vocab = vocab | specials
    by_id = {i: text for text, i in vocab.items()}
    for i in range(len(by_id)):
        if i not in by_id:
            raise ValueError(f"the id {i} is missing, of {len(by_id)}")
    texts = [by_id[i] for i in range(len(by_id))]
    scores = _scores([text for text in texts if text not in kinds], hf_json.merge_pairs(model))
    dummy, remove = _read_normalizer(value.get("normalizer"))
    return SentencePieceBpe(
        pieces=tuple(
            Piece(text, scores[text], Kind.NORMAL)
            if text in scores
            else Piece(text, 0.0, kinds[text])
            for text in texts
        ),
        byte_fallback=byte_fallback,
        add_dummy_prefix=dummy,
        remove_extra_whitespaces=remove,
        bos=_control(specials, "<s>", unknown),
        eos=_control(specials, "</s>", unknown),
    )


def _splits(text: str, pieces: Collection[str]) -> list[list[str]]:
    """The ways to make a piece of two others, the longest left part first."""
    pairs = ([text[:i], text[i:]] for i in range(len(text) - 1, 0, -1))
    return [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]


def _scores(texts: list[str], merges: list[list[str]]) -> dict[str, float]:
    """Scores of the normal pieces, in order of ids, that rank them as the merges do."""
    ways: dict[str, set[tuple[str, str]]] = {}
    previous = None
    for left, right in merges:
        made = left + right
        if made != previous and made in ways:
            raise ValueError(f"the merges that make {made!r} are not side by side")
        ways.setdefault(made, set()).add((left, right))
        previous = made
    known = set(texts)
    for text in texts:
        wanted = {(left, right) for left, right in _splits(text, known)}
        if wanted != ways.get(text, set()):
            left, right = min(wanted ^ ways.get(text, set()))
            raise ValueError(
                f"the merge of {left!r} and {right!r} is missing or makes no normal piece: these "
                "are not all the merges of SentencePiece"
            )
    order = list(ways)
    made = set(order)
    if [text for text in texts if text in made] != order:
        texts = order + [text for text in texts if text not in made]
    return {text: -float(i) for i, text in enumerate(texts)}


def _control(specials: Mapping[str, int], name: str, unknown: str) -> int | None:
    return specials[name] if name in specials and name != unknown else None


# Normalizer and decoder.


def _normalizer(dummy: bool, remove: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if remove:
        for regex, content in ((rf"[ {MARK}]+\z", ""), (r"\A +", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": regex}, "content": content})
    if dummy:
        steps.append({"type": "Prepend", "prepend": MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": MARK})
    return {"type": "Sequence", "normalizers": steps}


def _read_normalizer(value: Any) -> tuple[bool, bool]:
    if isinstance(value, dict) and value.get("type") == "Replace":
        value = {"type": "Sequence", "normalizers": [value]}
    for dummy in (True, False):
        for remove in (True, False):
            if value == _normalizer(dummy, remove):
                return dummy, remove
    raise ValueError(f"the normalizer is not one of SentencePiece's: {value!r:.120}")


def _decoder(strip: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
