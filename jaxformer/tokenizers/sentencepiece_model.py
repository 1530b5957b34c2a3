"""SentencePiece's own files: a `.model` is a protocol buffer with the pieces and their settings."""

import struct
from typing import Any

from jaxformer.tokenizers import protobuf
from jaxformer.tokenizers.sentencepiece import Kind, Piece, SentencePieceBpe

# Numbers of the fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _SPACE_IS_SUFFIX, _BYTE_FALLBACK = 3, 4, 24, 35
_UNKNOWN_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_UNKNOWN_PIECE, _BOS_PIECE, _EOS_PIECE = 45, 46, 47
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5

_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2


def parse(data: bytes) -> SentencePieceBpe:
    """Reads a `.model` of the type BPE.

    Raises:
        ValueError: If the bytes are no such model, or it normalises characters, marks words at
            their ends, or has unused pieces: none of this is supported.

    References:
        https://github.com/google/sentencepiece, src/sentencepiece_model.proto
    """
    try:
        model = _message(data)
        pieces = tuple(_piece(entry) for entry in model.get(_PIECES, ()))
        trainer, normalizer, denormalizer = (
            _message(b"".join(model.get(number, ())))
            for number in (_TRAINER, _NORMALIZER, _DENORMALIZER)
        )
        if not pieces:
            raise ValueError("it has no pieces")
        kind = _last(trainer, _MODEL_TYPE, 1)
        _check(kind, trainer, normalizer, denormalizer)
        controls = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == Kind.CONTROL}
        return SentencePieceBpe(
            pieces=pieces,
            byte_fallback=bool(_last(trainer, _BYTE_FALLBACK, 0)),
            add_dummy_prefix=bool(_last(normalizer, _DUMMY_PREFIX, 1)),
            remove_extra_whitespaces=bool(_last(normalizer, _REMOVE_SPACES, 1)),
            bos=controls.get(_last(trainer, _BOS_PIECE, b"<s>").decode()),
            eos=controls.get(_last(trainer, _EOS_PIECE, b"</s>").decode()),
        )
    except (AttributeError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"This is no SentencePiece model: {error}.") from None
    except ValueError as error:
        raise ValueError(f"This is no SentencePiece model that can be read: {error}") from None


def serialize(model: SentencePieceBpe) -> bytes:
    """Writes a `.model` that SentencePiece loads and `parse` reads as an equal value."""
    field = protobuf.field
    out = []
    for text, score, kind in model.pieces:
        piece = field(_TEXT, text) + field(_SCORE, float(score)) + field(_KIND, int(kind))
        out.append(field(_PIECES, piece))
    unknown = model.unknown_id
    trainer = field(_MODEL_TYPE, _BPE) + field(_VOCAB_SIZE, len(model.pieces))
    trainer += field(_BYTE_FALLBACK, model.byte_fallback)
    trainer += field(_UNKNOWN_ID, unknown) + field(_UNKNOWN_PIECE, model.pieces[unknown].text)
    # A name that no piece has keeps a reader from finding a token by the usual name.
    for (number, name), token in (
        ((_BOS_ID, _BOS_PIECE), model.bos),
        ((_EOS_ID, _EOS_PIECE), model.eos),
    ):
        trainer += field(number, -1 if token is None else token)
        trainer += field(name, "" if token is None else model.pieces[token].text)
    trainer += field(_PAD_ID, -1)
    normalizer = field(_NAME, "identity") + field(_CHARSMAP, b"")
    normalizer += field(_DUMMY_PREFIX, model.add_dummy_prefix)
    normalizer += field(_REMOVE_SPACES, model.remove_extra_whitespaces) + field(_ESCAPE_SPACES, 1)
    return b"".join(out) + field(_TRAINER, trainer) + field(_NORMALIZER, normalizer)


def _message(data: bytes) -> dict[int, list[Any]]:
    values: dict[int, list[Any]] = {}
    for number, value in protobuf.fields(data):
        values.setdefault(number, []).append(value)
    return values


def _last(message: dict[int, list[Any]], number: int, default: Any) -> Any:
    """A field's value; of several the last one counts, and a field left out has its default."""
    value = message.get(number, [default])[-1]
    if isinstance(value, bytes) != isinstance(default, bytes):
        raise ValueError(f"field {number} has the wrong type")
    return value


def _piece(data: bytes) -> Piece:
    message = _message(data)
    text = _last(message, _TEXT, b"").decode("utf-8")
    (score,) = struct.unpack("<f", _last(message, _SCORE, bytes(4)))
    kind = _last(message, _KIND, Kind.NORMAL)
    if kind not in tuple(Kind):
        raise ValueError(f"the piece {text!r} is of type {kind}, which is not supported")
    return Piece(text, score, Kind(kind))


def _check(kind: int, trainer: dict, normalizer: dict, denormalizer: dict) -> None:
    """Refuses what encoding would have to do otherwise."""
    if kind != _BPE:
        raise ValueError(f"its type is {_TYPES.get(kind, kind)}, only BPE is supported")
    if _last(trainer, _SPACE_IS_SUFFIX, 0):
        raise ValueError("treat_whitespace_as_suffix is not supported")
    if not _last(normalizer, _ESCAPE_SPACES, 1):
        raise ValueError("escape_whitespaces = false is not supported")
    for where, message in (("normalizer", normalizer), ("denormalizer", denormalizer)):
        if _last(message, _CHARSMAP, b""):
            name = _last(message, _NAME, b"").decode()
            raise ValueError(f"its {where} {name!r} changes characters; only identity is supported")
