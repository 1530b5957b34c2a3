"""The commands of `jaxformer tokenizer`."""

import dataclasses
import json as json_format
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import tyro

from jaxformer.commands import streams
from jaxformer.tokenizers import formats, patterns
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.char_bpe import CharBpe
from jaxformer.tokenizers.patterns import Pattern
from jaxformer.tokenizers.tokenizer import Tokenizer, write_atomically

Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FILE ...]")]
Path = Annotated[pathlib.Path, tyro.conf.Positional]
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Texts = Annotated[Names, tyro.conf.arg(metavar="FILE")]
Kind = Literal["bpe", "wordpiece", "char-bpe", "characters", "words"]
Digits = Literal["free", "single", "threes", "threes_from_right"]


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names.

    Raises:
        ValueError: If a file is malformed; the message names it, and the line.
        OSError: If a file cannot be read or written.
        SystemExit: If the arguments are none, with code 2, or ask for help.
    """
    commands = {
        "train": train,
        "encode": encode,
        "decode": decode,
        "card": card,
        "convert": convert,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="jaxformer tokenizer",
        description="Trains, runs, measures and converts tokenizers.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def train(
    files: Files = (),
    *,
    out: pathlib.Path,
    kind: Kind = "bpe",
    vocab_size: int | None = None,
    min_frequency: int | None = None,
    special: Names = (),
    unknown: str | None = None,
    pattern: str | None = None,
    digits: Digits | None = None,
    null: bool = False,
) -> None:
    """Learns a vocabulary from text files.

    Args:
        files: UTF-8 text; standard input if there are none, or for "-".
        out: Where the tokenizer is written: *.json, *.tiktoken, vocab.txt, or a folder for
            vocab.json and merges.txt.
        kind: Byte-level BPE, BERT's WordPiece, BPE of characters, characters, or words.
        vocab_size: Tokens, special ones included.
        min_frequency: What occurs less often becomes no token; by default what suits the kind.
        special: Name of a special token; may be given several times.
        unknown: Name of the token for what is not in the vocabulary; BPE needs none.
        pattern: How byte-level BPE cuts words: gpt2, which is the default, cl100k,
            cl100k_tiktoken, o200k, or an expression.
        digits: What becomes of runs of digits in these four patterns.
        null: Whether NUL bytes part a file into documents; otherwise each file is one.
    """
    _check_folder(out)
    options: dict = {"special_tokens": special}
    if vocab_size is not None:
        options["vocab_size"] = vocab_size
    elif kind in ("bpe", "wordpiece", "char-bpe"):
        raise ValueError(f"--kind {kind} needs --vocab-size.")
    if min_frequency is not None:
        options["min_frequency"] = min_frequency
    if unknown is not None:
        options["unknown"] = unknown
    learn = _trainer(kind, options, pattern, digits)
    _check_savable(learn, options, out)
    start = time.monotonic()
    if kind in ("characters", "words"):
        tokenizer = learn(streams.documents(files, null), **options)
    else:
        with streams.Bar("tokens") as bar:
            tokenizer = learn(streams.documents(files, null), **options, progress=bar.show)
    _save(tokenizer, out, None)
    seconds = time.monotonic() - start
    print(f"{out}: {tokenizer.vocab_size:,} tokens in {seconds:.1f} s", file=sys.stderr)


def _trainer(
    kind: Kind, options: dict, pattern: str | None, digits: str | None
) -> Callable[..., Tokenizer]:
    """The function that trains a kind, and the options that it takes besides."""
    if kind != "bpe" and (pattern is not None or digits is not None):
        raise ValueError(f"--pattern and --digits go with --kind bpe, not with {kind}.")
    if kind in ("characters", "words"):
        from jaxformer.tokenizers import plain

        return plain.Characters.train if kind == "characters" else plain.Words.train
    if kind == "bpe":
        if "unknown" in options:
            raise ValueError("--kind bpe takes no --unknown: every byte is a token.")
        options["pattern"] = _pattern("gpt2" if pattern is None else pattern, digits)
        from jaxformer.tokenizers import bpe as module
    elif kind == "wordpiece":
        from jaxformer.tokenizers import wordpiece
        from jaxformer.tokenizers import wordpiece_training as module

        options["special_tokens"] = options["special_tokens"] or wordpiece.SPECIAL_TOKENS
    else:
        from jaxformer.tokenizers import char_bpe as module
    return module.train


def _check_savable(learn: Callable[..., Tokenizer], options: dict, out: pathlib.Path) -> None:
    """Trains on next to nothing, to refuse what could not be written before hours of training."""
    # Special tokens of one character are what would be spelled as an ordinary token in most texts.
    letters = [name for name in options["special_tokens"] if len(name) == 1]
    few = {name: value for name, value in options.items() if name != "min_frequency"}
    formats.check(learn(letters, **few), out)


def _pattern(name: str, digits: str | None) -> Pattern:
    if name in patterns.FAMILIES:
        make = patterns.FAMILIES[name]
        return make() if digits is None else make(digits)
    if digits is not None:
        raise ValueError(f"--digits goes with --pattern {', '.join(patterns.FAMILIES)}.")
    found = patterns.published(name)
    found.split("a 1")  # refuses what is no expression
    return found


def _load(path: pathlib.Path) -> Tokenizer:
    try:
        return formats.load(path)
    except ValueError as error:
        if ".tiktoken" not in path.suffixes:
            raise
        hint = "`jaxformer tokenizer convert` takes --pattern and --special"
        raise ValueError(f"{error} ({hint})") from None


def _check_folder(path: pathlib.Path) -> None:
    """Refuses a place that nothing can be written to, before the work is done."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: the folder {path.parent} cannot be written to.")


def _save(tokenizer: Tokenizer, path: pathlib.Path, format: str | None) -> None:
    """Writes a tokenizer, and says if reading it does not give it back."""
    formats.save(tokenizer, path, format)
    try:
        same = formats.load(path) == tokenizer
    except ValueError:
        same = False
    if not same:
        note = "this format does not hold all of the tokenizer: special tokens or how text is cut"
        print(f"{path}: {note}", file=sys.stderr)


def encode(
    tokenizer: Path,
    files: Files = (),
    *,
    allow_special: Names = (),
    lines: bool = False,
    json: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """Turns text into ids: for each text a line of integers on standard output.

    Args:
        tokenizer: A tokenizer in any format.
        files: Each is one text; standard input if there are none, or for "-".
        allow_special: Name of a special token that the text may hold; may be given several times.
        lines: Whether each line is a text of its own, without its end.
        json: Whether a line of ids is a JSON list.
        out: A file that ends in .npy, for all ids in one int32 array instead.
    """
    if out is not None:
        _check_folder(out)
        if out.suffix != ".npy":
            raise ValueError(f"--out {out} does not end in .npy.")
        if json:
            raise ValueError(f"--json is for standard output, not for --out {out}.")
    encoder = _load(tokenizer)
    found = streams.encoded(encoder, files, lines, allow_special)
    if out is not None:
        write_atomically(out, streams.array_bytes(found))
        return
    for ids in found:
        text = str(ids) if json else " ".join(map(str, ids))
        sys.stdout.write(f"{text}\n")


def decode(
    tokenizer: Path,
    files: Files = (),
    *,
    lines: bool = False,
) -> None:
    """Turns ids into text, byte for byte on standard output.

    Args:
        tokenizer: A tokenizer in any format.
        files: Lines of integers or JSON lists, or .npy; standard input if there are none, or for
            "-".
        lines: Whether a line end is written after each line's text.
    """
    decoder = _load(tokenizer)
    output = sys.stdout.buffer
    for data in streams.decoded(decoder, files):
        output.write(data + b"\n" if lines else data)
    output.flush()


def card(
    tokenizers: Annotated[
        tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...")
    ],
    *,
    text: Texts = (),
    training: Texts = (),
    null: bool = False,
    json: bool = False,
    edits: int = 1000,
    strings: int = 100_000,
    every: int = 1,
    seed: int = 0,
) -> None:
    """Measures tokenizers side by side: efficiency, stability, universality, learnability.

    Args:
        tokenizers: Tokenizers in any format.
        text: UTF-8 text to measure on, may be given several times; standard input if it is not.
        training: Text for the n-gram model; if there is none, the last tenth of the text is
            predicted from the rest.
        null: Whether NUL bytes part a file into documents.
        json: Whether to print numbers for programs.
        edits: One-character edits, and draws of ids to encode again.
        strings: Random byte strings.
        every: Takes only each so-maniest Unicode scalar.
        seed: Of all draws.
    """
    from jaxformer.analysis import tokenizer_card

    if not tokenizers:
        raise ValueError("card needs a tokenizer.")
    loaded = {name: _load(path) for name, path in _names(tokenizers).items()}
    texts = list(streams.documents(text, null))
    known = list(streams.documents(training, null)) if training else None
    cards = {}
    for name, tokenizer in loaded.items():
        with streams.status(f"measuring {name}"):
            try:
                cards[name] = tokenizer_card.card(
                    tokenizer,
                    texts,
                    training=known,
                    edits=edits,
                    strings=strings,
                    every=every,
                    seed=seed,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if json:
        print(json_format.dumps(cards, indent=2))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 40 + sum(max(len(name) + 3, 13) for name in cards)
    Console(width=width).print(tokenizer_card.table(cards))


def _names(paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """The files' names without endings if these tell them apart, else the shortest that do."""
    ways = [[path.name.partition(".")[0] or path.name for path in paths]]
    ways += [["/".join(path.parts[-parts:]) for path in paths] for parts in range(1, 20)]
    for names in ways:
        if len(set(names)) == len(paths):
            return dict(zip(names, paths))
    raise ValueError(f"A tokenizer is named twice: {', '.join(map(str, paths))}.")


def convert(
    source: Path,
    target: Path,
    *,
    format: str | None = None,
    truncate: int | None = None,
    pattern: str | None = None,
    digits: Digits | None = None,
    special: Names = (),
    drop_special: bool = False,
) -> None:
    """Writes a tokenizer in another format.

    Args:
        source: A tokenizer in any format.
        target: Where it is written.
        format: One of json, hf, gpt2, tiktoken, bert, sentencepiece; if not given, the target's
            name tells.
        truncate: Keeps only so many tokens of BPE, the first ones learned.
        pattern: How words are cut, as for `train`, for ranks and GPT-2's files, which do not say.
        digits: What becomes of runs of digits in this pattern.
        special: NAME=ID of a special token, for the same files; may be given several times.
        drop_special: Leaves the special tokens out, before what is cut off by `truncate`.
    """
    _check_folder(target)
    if digits is not None and pattern is None:
        raise ValueError(f"--digits goes with --pattern {', '.join(patterns.FAMILIES)}.")
    if pattern is None and not special:
        tokenizer = _load(source)
    else:
        tokenizer = formats.load(
            source,
            pattern=None if pattern is None else _pattern(pattern, digits),
            special_tokens=_ids(special) if special else None,
        )
    if drop_special:
        tokenizer = _without_special(tokenizer, source)
    if truncate is not None:
        tokenizer = _truncated(tokenizer, truncate, source)
    _save(tokenizer, target, format)


def _without_special(tokenizer: Tokenizer, source: pathlib.Path) -> Tokenizer:
    try:
        left = dataclasses.replace(tokenizer, special_tokens={})
    except ValueError as error:
        raise ValueError(f"{source}: --drop-special is not possible here: {error}") from None
    if left.special_tokens:
        raise ValueError(f"{source}: a {type(tokenizer).__name__} needs its special tokens.")
    return left


def _truncated(tokenizer: Tokenizer, size: int, source: pathlib.Path) -> Tokenizer:
    if not isinstance(tokenizer, Bpe | CharBpe):
        raise ValueError(f"{source}: a {type(tokenizer).__name__} cannot be truncated.")
    high = [name for name, token in tokenizer.special_tokens.items() if token >= size > 0]
    if high:
        raise ValueError(
            f"{source}: the special token {high[0]!r} has the id "
            f"{tokenizer.special_tokens[high[0]]}, which {size} tokens leave out: --drop-special "
            "drops all special tokens."
        )
    return tokenizer.truncate(size)


def _ids(special: Sequence[str]) -> dict[str, int]:
    ids = {}
    for entry in special:
        name, _, number = entry.rpartition("=")
        if not name or not number.isdecimal():
            raise ValueError(f"--special {entry} is not NAME=ID.")
        ids[name] = int(number)
    return ids
