"""The command line: `jaxformer generate`, `inspect`, `tokenizer`, `cost`, `preflight`.

A command is imported when it is called for, so that those of tokenizers load no JAX. A user's
mistake is one line on standard error and exit code 2, an interrupt is 130 without a traceback, and
a pipe that closes, as before `head`, ends the program quietly with 141.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import BinaryIO

USAGE = """usage: jaxformer generate FOLDER --prompt TEXT [--help] ...
       jaxformer inspect FOLDER [--help] ...
       jaxformer tokenizer {train,encode,decode,card,convert} [--help] ...
       jaxformer cost [NAME] [--help] ...
       jaxformer preflight kernels [--help] ...
       jaxformer --version
"""
COMMANDS = ("cost", "generate", "inspect", "preflight", "tokenizer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What stands after the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    if sys.stdout is None or sys.stderr is None:  # as Python has it where the caller closed them
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stdout or _Closed()),
            contextlib.redirect_stderr(sys.stderr or nowhere),
        ):
            return main(arguments)
    try:
        return _run(arguments)
    except ValueError as error:
        return _failed(str(error))


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from jaxformer import __version__

        print(__version__)
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if not words or words[0] not in COMMANDS:
        named = f"there is no command {words[0]!r}" if words else "which command?"
        print(f"jaxformer: {named}\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"jaxformer.commands.{words[0]}")
        code = command.run(words[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return code or 0


class _Closed(io.TextIOBase):
    """Standard output that is closed: whatever would be written there is an error."""

    def write(self, _: str) -> int:
        raise ValueError("standard output is closed.")

    @property
    def buffer(self) -> BinaryIO:
        raise ValueError("standard output is closed.")


def _failed(message: str) -> int:
    line = " ".join(message.split())
    print(f"jaxformer: {line}", file=sys.stderr)
    return 2
