"""Text and ids from files or standard input, with errors that name the file and the line."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxformer.tokenizers.tokenizer import Tokenizer, utf8

_ID = re.compile(rb"-?[0-9]{1,40}")


def opened(files: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Opens one file after the other: standard input if there are none, or for "-"."""
    for name in files or ("-",):
        if name == "-":
            if sys.stdin is None:
                raise ValueError("standard input is closed.")
            yield "standard input", sys.stdin.buffer
        else:
            with open(name, "rb") as file:
                yield name, file


def documents(files: Sequence[str], null: bool) -> Iterator[str]:
    """Reads UTF-8: each file is a document, or each part between NUL bytes.

    Raises:
        ValueError: If a file is no UTF-8; it names the file, the line and the byte.
    """
    for name, file in opened(files):
        text = utf8(file.read(), name)
        yield from text.split("\0") if null else [text]


def encoded(
    tokenizer: Tokenizer, files: Sequence[str], lines: bool, allow_special: Sequence[str]
) -> Iterator[list[int]]:
    """Encodes each file, or each line without its end.

    Raises:
        ValueError: If the text cannot be encoded; it names the file and the line.
    """
    tokenizer.encode("", allow_special=allow_special)  # refuses names that are none
    for name, file in opened(files):
        if not lines:
            yield _encoded(tokenizer, file.read(), name, 1, allow_special)
            continue
        for number, line in enumerate(file, 1):
            yield _encoded(tokenizer, line.removesuffix(b"\n"), name, number, allow_special)


def _encoded(
    tokenizer: Tokenizer, data: bytes, name: str, number: int, allow_special: Sequence[str]
) -> list[int]:
    """Encodes a text that starts in a line of a file."""
    try:
        if allow_special:
            return tokenizer.encode(data.decode(), allow_special=allow_special)
        return tokenizer.encode_bytes(data)
    except ValueError as error:
        reason = error
    try:
        data.decode()
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise ValueError(f"{name}: line {number}: no UTF-8: {error.reason}.") from None
    for i, line in enumerate(data.split(b"\n") if b"\n" in data else ()):
        _encoded(tokenizer, line, name, number + i, allow_special)
    raise ValueError(f"{name}: line {number}: {reason}")


def decoded(tokenizer: Tokenizer, files: Sequence[str]) -> Iterator[bytes]:
    """Decodes each line of integers, or the JSON list on it, or the array of a .npy file.

    Raises:
        ValueError: If something is no id of the tokenizer; it names the file and the line.
    """
    for name, file in opened(files):
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(b"\x93NUMPY"):
                yield _decoded_array(tokenizer, line + file.read(), name)
                break
            try:
                yield tokenizer.decode_bytes(_ids(line.strip()))
            except ValueError as error:
                raise ValueError(f"{name}: line {number}: {error}") from None


def _ids(line: bytes) -> list[int]:
    if not line.startswith(b"["):
        for word in line.split():
            if not _ID.fullmatch(word):
                raise ValueError(f"{word.decode(errors='replace')!r:.40} is no id.")
        return [int(word) for word in line.split()]
    try:
        ids = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {error}.") from None
    for token in ids:
        if type(token) is not int:
            raise ValueError(f"{token!r:.40} is no id.")
    return ids


def _decoded_array(tokenizer: Tokenizer, data: bytes, name: str) -> bytes:
    try:
        ids = np.load(io.BytesIO(data), allow_pickle=False)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"an array of {ids.dtype} with {ids.ndim} axes holds no ids.")
        return tokenizer.decode_bytes(ids)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name}: {error}") from None


def array_bytes(sequences: Iterator[list[int]]) -> bytes:
    """All ids as one int32 array, in the format .npy."""
    file = io.BytesIO()
    arrays = [np.array(ids, np.int32) for ids in sequences]
    np.save(file, np.concatenate([np.zeros(0, np.int32), *arrays]))
    return file.getvalue()


class Bar:
    """A bar at the foot of the terminal while a block runs, and nothing where there is none."""

    def __init__(self, unit: str) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            import rich.console
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(unit),
                progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("counting words", total=None)

    def __enter__(self) -> "Bar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Shows how much is done."""
        if self._bar is not None:
            self._bar.update(self._task, description="merging", completed=done, total=total)


def status(text: str) -> contextlib.AbstractContextManager:
    """Shows what is being done while a block runs, on a terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    import rich.console

    return rich.console.Console(stderr=True).status(text)
