"""The command line: `jaxformer tokenizer train | encode | decode | card | convert`.

A user's mistake is one line on standard error and exit code 2, an interrupt is 130 without a
traceback, and a pipe that closes, as before `head`, ends the program quietly with 141.
"""

import os
import sys
from collections.abc import Sequence

USAGE = """usage: jaxformer tokenizer {train,encode,decode,card,convert} [--help] ...
       jaxformer --version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What stands after the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from jaxformer import __version__

        print(__version__)
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if words[:1] != ["tokenizer"]:
        named = f"there is no command {words[0]!r}" if words else "which command?"
        print(f"jaxformer: {named}\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        from jaxformer.commands import tokenizer

        tokenizer.run(words[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        return _failed(str(error))
    return 0


def _failed(message: str) -> int:
    line = " ".join(message.split())
    print(f"jaxformer: {line}", file=sys.stderr)
    return 2
