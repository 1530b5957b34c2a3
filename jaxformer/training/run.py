"""The folder of a run (config, metrics, TensorBoard, profile, report), and its progress.

    with run.Run("runs/digits") as record:
        ...                                         # restore: `done` steps are behind us
        record.start(done, total_steps, units_per_step=batch, config=config)
        for step in range(done + 1, total_steps + 1):
            state, metrics = train_step(state, source.batch(step))
            record.step(step, metrics)              # waits for the device at logged steps only
            if step % 500 == 0:
                record.write(step, evaluate(state))
        record.report({"nats": nats})

A step's number counts finished steps: the first is 1. The folder then holds `config.json`,
`metrics.jsonl` (the truth: what a resumed run writes equals what an unbroken one does, byte for
byte, so it holds no clock), `tensorboard/` (the same with the speed added; profiles too) and
`report.json`.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxformer.training import progress, records


class TrainingDiverged(RuntimeError):
    """A metric is no longer finite; the last checkpoint before it is still good."""


class FolderInUse(RuntimeError):
    """Another process writes to the same run folder."""


def check_least(config: Any, **least: int) -> None:
    """Refuses settings below what makes sense: `check_least(self, steps=1, batch=2)`.

    Raises:
        ValueError: If an attribute of `config` is less; names it.
    """
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"{name} must be at least {value}, got {getattr(config, name)}.")


def check_finite(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Fetches scalars from the device, waiting for them, and returns them as numbers.

    Raises:
        TrainingDiverged: If one is NaN or infinite.
        ValueError: If one is not a scalar.
    """
    fetched = jax.device_get(dict(metrics))
    for name, value in fetched.items():
        if np.ndim(value):
            raise ValueError(
                f"The metric {name!r} has shape {np.shape(value)}; scalars are logged."
            )
        if not np.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {float(value)} at step {step}. The last checkpoint is kept. In another "
                "folder, train with a lower learning rate, a longer warm-up or stronger clipping."
            )
    return {name: np.asarray(value).item() for name, value in fetched.items()}


def enable_compile_cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """Keeps compiled programs on disk, so that a second start compiles nothing.

    Args:
        folder: Where; by default `$JAX_COMPILATION_CACHE_DIR`, or else `~/.cache/jaxformer/xla`.

    Returns:
        The folder, or None if it cannot be written: then programs are compiled as ever.
    """
    try:
        chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
        chosen = pathlib.Path(chosen or pathlib.Path.home() / ".cache" / "jaxformer" / "xla")
        chosen.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen).close()
    except (OSError, RuntimeError):  # RuntimeError: no home directory is known
        return None
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # a program compiled before would have fixed the old answer
    return chosen


class Run:
    """A run folder, made and locked by one process at a time.

    The lock is the kernel's: it goes with the process, however that ends. Where several processes
    train together only the first writes; the others check their metrics and do nothing else.

    Attributes:
        folder: Where everything is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Makes the folder and locks it.

        Raises:
            FolderInUse: If another process, or another `Run` of this one, has it open.
        """
        self.folder = pathlib.Path(folder)
        self._closing = contextlib.ExitStack()
        self._main = jax.process_index() == 0
        self._profiling = False
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._closing.enter_context(_locked(self.folder / ".lock"))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        done: int,
        total_steps: int,
        *,
        units_per_step: int,
        config: Any,
        unit: str = "images",
        every: int = 50,
        profile: tuple[int, int] | None = None,
    ) -> None:
        """Writes the configuration and cuts the metrics back to what `done` steps had written.

        Args:
            done: Steps finished before, 0 for a new run: later rows are dropped, since they will
                be written again, and TensorBoard hides their points.
            total_steps: Steps after which the run is complete.
            units_per_step: How many images, tokens, ... a step takes.
            config: A dataclass or mapping for `config.json`.
            unit: What `units_per_step` counts.
            every: Steps between two logged ones; the first and the last are logged as well.
            profile: The first and last step of this process to trace, counted from 1; to be
                opened with TensorBoard or xprof on `tensorboard/`.

        Raises:
            ValueError: If `every`, `done` or `profile` is out of range.
        """
        if every < 1 or not 0 <= done <= total_steps:
            raise ValueError(
                f"A run needs every >= 1 and 0 <= done <= total_steps, got every={every}, "
                f"done={done}, total_steps={total_steps}."
            )
        if profile is not None and not 1 <= profile[0] <= profile[1]:
            raise ValueError(f"profile needs 1 <= first <= last, got {profile}.")
        self._first, self._total, self._every = done + 1, total_steps, every
        self._profile = profile and (done + profile[0], done + profile[1])
        self._unit = unit
        self._clock = progress.Clock(done, total_steps, units_per_step)
        if self._main:
            rows = self.folder / "metrics.jsonl"
            records.cut_metrics(rows, done)
            records.write_json(self.folder / "config.json", config)
            self._file = self._closing.enter_context(rows.open("ab", buffering=0))
            self._events = self._closing.enter_context(_Events(self.folder / "tensorboard", done))
            self._line = self._closing.enter_context(progress.line(done, total_steps, unit))
        self._trace_before(done + 1)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes that `step` was dispatched; at logged steps waits for it, checks and writes it.

        Args:
            step: The number of the step, from 1.
            metrics: Scalars, on the device or not; "loss" is shown.

        Raises:
            TrainingDiverged: At a logged step, if a metric is not finite; nothing is written.
        """
        due = step == 1 or step % self._every == 0 or step == self._total
        if due or step == self._first:  # the first step of a process says how long compiling took
            values = check_finite(step, metrics)
            rate, left = self._clock.tick(step)
            if self._main:
                if due:
                    self._append(
                        step, values, {} if rate is None else {f"{self._unit}_per_second": rate}
                    )
                self._line.show(step, values.get("loss", math.nan), rate, left)
        if self._profile is not None:
            if step == self._profile[1] and self._profiling:
                jax.block_until_ready(dict(metrics))
                self._stop_trace()
            self._trace_before(step + 1, metrics)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes what was measured after `step`, an evaluation say, as a row of its own.

        Write it before the checkpoint of the same step: a run resumed from there repeats neither.

        Raises:
            TrainingDiverged: If a metric is not finite.
        """
        values = check_finite(step, metrics)
        if self._main:
            self._append(step, values, {})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of the speed, for evaluations and pictures between two steps."""
        with self._clock.paused():
            yield

    def report(self, values: Any) -> None:
        """Writes `report.json`, whole or not at all."""
        if self._main:
            records.write_json(self.folder / "report.json", values)

    def close(self) -> None:
        """Ends progress line, events and profile and gives the folder free; twice is once."""
        if self._profiling:
            self._stop_trace()
        self._closing.close()

    def _append(self, step: int, values: dict[str, float], speed: dict[str, float]) -> None:
        row = json.dumps({"step": step} | values, allow_nan=False)
        self._file.write(row.encode() + b"\n")
        self._events.add(step, values | speed)

    def _trace_before(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        if self._main and self._profile is not None and step == self._profile[0]:
            jax.block_until_ready(dict(metrics or {}))
            jax.profiler.start_trace(str(self.folder / "tensorboard"))
            self._profiling = True

    def _stop_trace(self) -> None:
        self._profiling = False
        jax.profiler.stop_trace()


class _Events:
    """TensorBoard events; imported in the background, for the import can take seconds."""

    def __init__(self, folder: pathlib.Path, done: int) -> None:
        background = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._writer = background.submit(self._open, str(folder), done + 1)
        background.shutdown(wait=False)

    @staticmethod
    def _open(folder: str, first_step: int) -> Any:
        from tensorboardX import SummaryWriter

        # Files are named by the second: a quick restart would overwrite what it follows.
        suffix = f".{time.time_ns()}"
        return SummaryWriter(folder, purge_step=first_step, filename_suffix=suffix)

    def __enter__(self) -> "_Events":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.result().close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer.result()
        for name, value in values.items():
            writer.add_scalar(name, value, step)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FolderInUse(
                f"{path.parent} is in use by process {file.read().strip() or 'unknown'}: wait for "
                "it to end, or choose another folder."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
