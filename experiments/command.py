"""An experiment as a command: settings from its arguments, one line where something is wrong."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from jaxformer.analysis.representation import Collapsed
from jaxformer.training.checkpoint import CheckpointError
from jaxformer.training.run import FolderInUse, TrainingDiverged

_OF_RUNS = (Collapsed, CheckpointError, FolderInUse, TrainingDiverged)


def run(main: Callable[[Any], int], config: type, description: str | None) -> NoReturn:
    """Ends the process with the status of `main`; 1 and a line if it cannot, 130 after Ctrl-C.

    Args:
        main: Takes the settings.
        config: Their dataclass.
        description: For `--help`.
    """
    try:
        sys.exit(main(tyro.cli(config, description=description)))
    except (OSError, ValueError, ModuleNotFoundError, *_OF_RUNS) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
