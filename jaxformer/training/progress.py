"""How far a run is, how fast and how long it still takes: a live line, or plain lines in a file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


class Clock:
    """Measures speed between ticks, without the first step, which compiles, and without pauses.

    Args:
        done: Steps finished before.
        total_steps: Steps after which nothing is left.
        units_per_step: Images, tokens, ... of a step.
        now: Gives the time in seconds.
    """

    def __init__(
        self,
        done: int,
        total_steps: int,
        units_per_step: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._done, self._total, self._units, self._now = done, total_steps, units_per_step, now
        self._idle = 0.0
        self._start: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def tick(self, step: int) -> tuple[float | None, float | None]:
        """Notes that `step` has finished on the device.

        Returns:
            Units a second since the last tick, and seconds left at the mean speed since the
            first one, pauses included; None for both at the first tick.
        """
        wall = self._now()
        busy = wall - self._idle
        if self._start is None or self._last is None:
            self._start, self._last = (step, wall), (step, busy)
            return None, None
        rate = (step - self._last[0]) * self._units / max(busy - self._last[1], 1e-9)
        each = (wall - self._start[1]) / max(step - self._start[0], 1)
        self._last = (step, busy)
        return rate, each * (self._total - step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens within the block out of the speed."""
        begin = self._now()
        try:
            yield
        finally:
            self._idle += self._now() - begin


class PlainLine:
    """Prints a line for each step shown, for files and pipes."""

    def __init__(self, total_steps: int, unit: str) -> None:
        self._total, self._unit = total_steps, unit

    def __enter__(self) -> "PlainLine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, step: int, loss: float, rate: float | None, left: float | None) -> None:
        """Shows a finished step, with units a second and seconds left where they are known."""
        width = len(str(self._total))
        text = f"step {step:{width}}/{self._total}  {_state(loss, rate, self._unit)}"
        if left is not None:
            text += f"  left {_duration(left)}"
        print(text, flush=True)


class LiveLine:
    """Redraws one line at the foot of a terminal; whatever else is printed appears above it."""

    def __init__(self, done: int, total_steps: int, unit: str) -> None:
        from rich import progress

        self._unit = unit
        self._bar: Any = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=done)

    def __enter__(self) -> "LiveLine":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, loss: float, rate: float | None, left: float | None) -> None:
        """Shows a finished step, with units a second and seconds left where they are known."""
        text = _state(loss, rate, self._unit)
        if left is not None:
            text += f"  left {_duration(left)}"
        self._bar.update(self._task, completed=step, description=text)


def line(done: int, total_steps: int, unit: str) -> PlainLine | LiveLine:
    """Makes a live line where standard output is a terminal, and plain lines where it is not."""
    if sys.stdout.isatty():
        return LiveLine(done, total_steps, unit)
    return PlainLine(total_steps, unit)


def _state(loss: float, rate: float | None, unit: str) -> str:
    text = f"loss {loss:.4f}"
    return text if rate is None else f"{text}  {rate:,.0f} {unit}/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
