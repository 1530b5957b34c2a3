"""WordPiece in the layout of `tokenizer.json`."""

from collections.abc import Mapping
from typing import Any

from jaxformer.tokenizers import hf_json
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.wordpiece import WordPiece

_RAW = BertText(lowercase=False, clean=False, chinese=False)


def write(tokenizer: WordPiece) -> dict[str, Any]:
    """Describes a tokenizer completely, and adds BERT's frame if it has [CLS] and [SEP].

    Raises:
        ValueError: If a special token is spelled as an ordinary one is.
    """
    text = tokenizer.text
    description = hf_json.document(
        tokenizer.special_tokens,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": text.clean,
            "handle_chinese_chars": text.chinese,
            "strip_accents": text.strip_accents,
            "lowercase": text.lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": tokenizer.prefix, "cleanup": tokenizer.cleanup},
        model={
            "type": "WordPiece",
            "unk_token": tokenizer.unknown or "",
            "continuing_subword_prefix": tokenizer.prefix,
            "max_input_chars_per_word": tokenizer.max_characters,
            "vocab": {token: i for i, token in enumerate(tokenizer.tokens) if token is not None},
        },
    )
    if {"[CLS]", "[SEP]"} <= set(tokenizer.special_tokens):
        description["post_processor"] = _frame(tokenizer.special_tokens)
    return description


def read(data: Mapping[str, Any]) -> WordPiece:
    """Makes the tokenizer that a description says; what it adds around a text is dropped.

    Raises:
        ValueError: If it is malformed, or its normalisation, its splitting or its decoding are not
            BERT's.
    """
    model = data["model"]
    vocab = hf_json.vocabulary(model)
    specials = hf_json.added_tokens(data, vocab)
    unknown = _field(model, "model", "unk_token", str)
    prefix = _field(model, "model", "continuing_subword_prefix", str)
    if unknown in vocab:
        specials[unknown] = vocab[unknown]
    _part(data, "pre_tokenizer", "BertPreTokenizer")
    decoder = _part(data, "decoder", "WordPiece")
    if decoder.get("prefix") != prefix:
        raise ValueError(f"the prefixes {prefix!r} and {decoder.get('prefix')!r} differ")
    ids = {i: token for token, i in vocab.items() if token not in specials}
    return WordPiece(
        tokens=tuple(ids.get(i) for i in range(1 + max(ids, default=-1))),
        unknown=unknown if unknown in specials else None,
        special_tokens=specials,
        prefix=prefix,
        max_characters=_field(model, "model", "max_input_chars_per_word", int),
        text=_text(data),
        cleanup=_field(decoder, "decoder", "cleanup", bool),
    )


def _frame(special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor that adds [CLS] and [SEP]."""

    def special(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    single = [special("[CLS]", 0), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]", 0)]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, special("[SEP]", 1)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {
            name: {"id": name, "ids": [special_tokens[name]], "tokens": [name]}
            for name in ("[CLS]", "[SEP]")
        },
    }


def _text(data: Mapping[str, Any]) -> BertText:
    if data.get("normalizer") is None:
        return _RAW
    part = _part(data, "normalizer", "BertNormalizer")
    strip = part.get("strip_accents")
    if strip is not None and not isinstance(strip, bool):
        raise ValueError(f"normalizer.strip_accents is {strip!r:.50}")
    lowercase, clean, chinese = (
        _field(part, "normalizer", name, bool)
        for name in ("lowercase", "clean_text", "handle_chinese_chars")
    )
    return BertText(lowercase=lowercase, strip_accents=strip, clean=clean, chinese=chinese)


def _part(data: Mapping[str, Any], name: str, kind: str) -> Mapping[str, Any]:
    part = data.get(name)
    if not isinstance(part, dict) or part.get("type") != kind:
        found = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f"the {name} of a WordPiece is {kind}, here it is {found!r:.50}")
    return part


def _field(part: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    if type(part.get(name)) is not kind:
        raise ValueError(f"{where}.{name} is missing or malformed: {part.get(name)!r:.50}")
    return part[name]
