"""Signals that ask a run to stop, turned into a flag that the loop reads between two steps."""

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """Catches SIGTERM and SIGINT within a `with` block, so that the loop can save and leave.

        with Interrupts() as interrupts:
            while step < steps:
                ...
                if interrupts.reached(step):
                    break

    A SIGINT that follows any other signal raises KeyboardInterrupt at once, so that a second Ctrl-C
    always ends the program. The handlers that were there before come back at the end of the block.

    Where several processes train together nothing is caught: they must stop at the same step, and
    JAX arranges that among them once any of them receives SIGTERM; `reached` asks for it. The block
    can only be entered in the main thread (ValueError elsewhere).

    Attributes:
        requested: The name of the first signal received, such as "SIGTERM", or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if jax.process_count() == 1:
            for caught in (signal.SIGTERM, signal.SIGINT):
                self._previous[caught] = signal.signal(caught, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for caught, handler in self._previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(caught, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def reached(self, step: int) -> bool:
        """Whether the run should save and stop after `step`, the same answer in every process.

        Args:
            step: The step just finished; with several processes, ask at every step.
        """
        if jax.process_count() == 1:
            return self.requested is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
