"""Reads and writes tokenizers in the formats that are in use, and tells them apart.

| format | files | read | written |
|---|---|---|---|
| `json` | what `Tokenizer.save` writes; for BPE and WordPiece that of `hf` | all | all |
| `hf` | `tokenizer.json` of Hugging Face's `tokenizers` | BPE, WordPiece | BPE, WordPiece |
| `gpt2` | a folder with `vocab.json` and `merges.txt`, or the older names | byte-level BPE | same |
| `tiktoken` | `*.tiktoken`, ranks of tokens | byte-level BPE | same |
| `bert` | `vocab.txt`, a token on each line | WordPiece, ESM's alphabet | same |
| `sentencepiece` | `*.model` | BPE | same |

Each file may be compressed by gzip. Only `json` holds every tokenizer completely; what the others
leave out is said where they are written.
"""

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from jaxformer.tokenizers import (
    alphabets,
    gpt2_files,
    hf_json,
    kmers,
    plain,
    sentencepiece_json,
    sentencepiece_model,
    tiktoken_ranks,
    vocab_txt,
)
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.char_bpe import CharBpe
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.sentencepiece import SentencePieceBpe
from jaxformer.tokenizers.tokenizer import Tokenizer, utf8, write_atomically
from jaxformer.tokenizers.wordpiece import WordPiece

Kind = TypeVar("Kind", bound=Tokenizer)

FORMATS = ("json", "hf", "gpt2", "tiktoken", "bert", "sentencepiece")

_KINDS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "bytes": plain.Bytes,
        "characters": plain.Characters,
        "words": plain.Words,
        "alphabet": alphabets.Alphabet,
        "kmers": kmers.Kmers,
        "sentencepiece": SentencePieceBpe,
    }
)


def load(
    path: str | os.PathLike,
    *,
    pattern: Pattern | None = None,
    special_tokens: Mapping[str, int] | None = None,
    text: BertText | None = None,
) -> Tokenizer:
    """Reads a tokenizer from a file or folder in any of these formats.

    Args:
        path: The file; either of GPT-2's two files, if the other lies beside it; or the folder.
        pattern: How text is cut into words, for ranks and GPT-2's files, which do not say. The
            published ranks `r50k_base`, `p50k_base`, `cl100k_base` and `o200k_base` have theirs,
            GPT-2's files have GPT-2's.
        special_tokens: Names and ids, for the same files; those of the published ranks are known.
        text: How BERT's `vocab.txt`, which does not say, normalises text; as uncased BERT if None.

    Raises:
        ValueError: If the file is none of these or is malformed, or holds what this library cannot
            do with the same ids; it names the file, and the line where there are lines. Also if an
            argument is given for a file that says this itself.
        OSError: If a file cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _in_folder(path)
    try:
        return _read(path, pattern, special_tokens, text)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path}: {reason}.") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the description is malformed: {error!r}.") from error


def _read(
    path: pathlib.Path,
    pattern: Pattern | None,
    special_tokens: Mapping[str, int] | None,
    text: BertText | None,
) -> Tokenizer:
    name, data = _bare(path), _bytes(path)
    if not data.strip():
        raise ValueError("the file is empty")
    pair = _pair(path)
    if text is not None and (pair is not None or not name.endswith(".txt")):
        raise ValueError("text is for vocab.txt, other files say it themselves")
    if pair is not None:
        vocab, merges = (_bytes(file) for file in pair)
        return gpt2_files.parse(
            parse_json(vocab), merges, pattern=pattern, special_tokens=special_tokens
        )
    if name.endswith(".tiktoken"):
        return _ranks(name.removesuffix(".tiktoken"), data, pattern, special_tokens)
    if pattern is not None or special_tokens is not None:
        raise ValueError("pattern and special_tokens are for files of ranks and GPT-2's two files")
    if name.endswith(".model"):
        return sentencepiece_model.parse(data)
    if data.lstrip()[:1] == b"{":
        return from_json(parse_json(data))
    if name.endswith(".txt"):
        return vocab_txt.parse(data, text=text)
    raise ValueError(
        "this is no format that can be read: known are JSON, *.tiktoken, *.model, vocab.txt, and "
        "vocab.json beside merges.txt"
    )


def _ranks(
    name: str,
    data: bytes,
    pattern: Pattern | None,
    special_tokens: Mapping[str, int] | None,
) -> Bpe:
    published = tiktoken_ranks.published(name)
    if published is not None:
        pattern = published[0] if pattern is None else pattern
        special_tokens = published[1] if special_tokens is None else special_tokens
    if pattern is None:
        raise ValueError("the file does not say how text is cut into words: give the pattern")
    return tiktoken_ranks.parse(data, pattern=pattern, special_tokens=special_tokens or {})


def from_json(value: Any) -> Tokenizer:
    """Makes a tokenizer of what `to_json` gives, or of a parsed `tokenizer.json`.

    Raises:
        ValueError: If it is malformed, or would give other ids here than elsewhere.
    """
    if not isinstance(value, dict):
        raise ValueError("the JSON is no object")
    if "jaxformer" in value:
        kind = value["jaxformer"]
        if kind not in _KINDS:
            raise ValueError(f"there is no tokenizer of the kind {kind!r}")
        return _KINDS[kind].from_json(value)
    model = value.get("model")
    if not isinstance(model, dict):
        raise ValueError("model is missing: this is no tokenizer.json, and no vocabulary alone")
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "WordPiece":
        return WordPiece.from_json(value)
    if kind != "BPE":
        raise ValueError(f"the model {kind!r} is not supported: known are BPE and WordPiece")
    if model.get("end_of_word_suffix"):
        return CharBpe.from_json(value)
    if model.get("fuse_unk") or "Prepend" in json.dumps(value.get("normalizer")):
        return sentencepiece_json.from_json(value)
    return hf_json.bpe_from_json(value)


def parse_json(data: bytes) -> Any:
    """Parses JSON; what is malformed or names a key twice is a ValueError."""
    try:
        return json.loads(utf8(data, "the file"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error}") from None
    except RecursionError:
        raise ValueError("malformed JSON: it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return value


# Files.


def _bare(path: pathlib.Path) -> str:
    return path.name.removesuffix(".gz")


def _bytes(path: pathlib.Path) -> bytes:
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None


def _existing(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    files = (folder / (name + ending) for name in names for ending in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _pair(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """GPT-2's two files, if the path is one of them."""
    vocabularies, lists = gpt2_files.VOCABULARY_NAMES, gpt2_files.MERGES_NAMES
    name = _bare(path)
    if name in vocabularies and (beside := _existing(path.parent, lists)):
        return path, beside
    if name in lists:
        if beside := _existing(path.parent, vocabularies):
            return beside, path
        raise ValueError(f"there is no {' or '.join(vocabularies)} beside it")
    return None


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    names = ("tokenizer.json", *gpt2_files.MERGES_NAMES, "tokenizer.model", "vocab.txt")
    found = _existing(folder, names)
    if found is None:
        raise ValueError(f"{folder}: the folder holds none of {', '.join(names)}.")
    return found


def save(tokenizer: Tokenizer, path: str | os.PathLike, format: str | None = None) -> None:
    """Writes a tokenizer, each file as the old or the new one whole.

    Args:
        path: The file, or the folder for `gpt2`, which is made if need be. A name that ends in
            `.gz` is compressed.
        format: One of `FORMATS`; if None, the name tells: `*.tiktoken`, `*.model`, `vocab.txt`, a
            name without an ending for `gpt2`, and `json` for all else.

    Raises:
        ValueError: If the format is unknown or cannot hold the tokenizer.
    """
    path = pathlib.Path(path)
    files = _files(tokenizer, path, format)
    if path not in files:
        path.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        write_atomically(file, data)


def check(tokenizer: Tokenizer, path: str | os.PathLike, format: str | None = None) -> None:
    """Raises the ValueError that `save` would, without writing anything."""
    _files(tokenizer, pathlib.Path(path), format)


def _files(
    tokenizer: Tokenizer, path: pathlib.Path, format: str | None
) -> dict[pathlib.Path, bytes]:
    """What each file is to hold, in the order of writing."""
    format = _format_of(path) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"The format is one of {', '.join(FORMATS)}, got {format!r}.")
    if format == "gpt2":
        vocab, merges = gpt2_files.serialize(_of(tokenizer, Bpe, format))
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: GPT-2's two files need a folder, this is a file.")
        # The merges last: a reader then never finds new merges with an old vocabulary alone.
        return {
            path / gpt2_files.VOCABULARY_NAMES[0]: vocab,
            path / gpt2_files.MERGES_NAMES[0]: merges,
        }
    data = _serialized(tokenizer, format)
    return {path: gzip.compress(data, mtime=0) if path.suffix == ".gz" else data}


def _serialized(tokenizer: Tokenizer, format: str) -> bytes:
    if format == "tiktoken":
        return tiktoken_ranks.serialize(_of(tokenizer, Bpe, format))
    if format == "sentencepiece":
        return sentencepiece_model.serialize(_of(tokenizer, SentencePieceBpe, format))
    if format == "bert":
        return vocab_txt.serialize(tokenizer)
    value = tokenizer.to_json()
    if format == "hf" and isinstance(tokenizer, SentencePieceBpe):
        value = sentencepiece_json.to_json(tokenizer)
    elif format == "hf" and "model" not in value:
        raise ValueError(f"tokenizer.json cannot hold a {type(tokenizer).__name__}.")
    return json.dumps(value, ensure_ascii=False).encode()


def _of(tokenizer: Tokenizer, kind: type[Kind], format: str) -> Kind:
    if not isinstance(tokenizer, kind):
        raise ValueError(f"The format {format!r} cannot hold a {type(tokenizer).__name__}.")
    return tokenizer


def _format_of(path: pathlib.Path) -> str:
    name = _bare(path)
    if path.is_dir() or "." not in name:
        return "gpt2"
    if name == "vocab.txt":
        return "bert"
    ending = pathlib.PurePath(name).suffix
    return {".tiktoken": "tiktoken", ".model": "sentencepiece"}.get(ending, "json")
