"""The loop of a run: goes on where it stood, steps, writes, saves, and stops when asked."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxformer.training import checkpoint, data, interrupts, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import Step

_AHEAD = 2  # steps under way; many can block each other where a CPU simulates devices


def train(
    state: TrainState,
    step_fn: Step,
    source: data.Source,
    record: run.Run,
    *,
    steps: int,
    config: Any,
    meaning: Mapping[str, Any],
    units_per_step: int,
    unit: str = "images",
    save_every: int = 500,
    log_every: int = 50,
    profile: tuple[int, int] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
) -> TrainState | None:
    """Trains to the end, or until a signal asks for a stop.

    Args:
        state: Before the first step; a checkpoint in the run's folder takes its place.
        step_fn: Takes a state and a batch to the next state and metrics; may donate the state.
        source: Batch `k` belongs to step `k + 1`.
        record: The open run; checkpoints lie in its folder, under `checkpoints`.
        steps: Steps after which the run is complete.
        config: A dataclass or mapping for the run's `config.json`.
        meaning: What the numbers of a checkpoint depend on; one of another meaning is refused.
        units_per_step: How many of what `unit` names a step takes.
        unit: Of the speed.
        save_every: Steps between checkpoints; the last step and one that a signal ends are saved
            as well.
        log_every: Steps between rows.
        profile: First and last step of this process to trace, counted from 1.
        evaluate: What to measure, and write, before a checkpoint that no signal asked for.

    Returns:
        The state after the last step, or None after a signal.

    Raises:
        CheckpointError: If a checkpoint cannot be written, read or accepted.
        TrainingDiverged: If a metric is not finite.
        ValueError: If a checkpoint was trained on other data.
    """
    folder = record.folder / "checkpoints"
    with checkpoint.Checkpoints(folder, meaning) as saved, interrupts.Interrupts() as stop:
        restored, done = saved.restore(state), 0
        if restored is not None:
            data.check_position(source, restored.step, restored.data_position)
            state, done = restored.state, restored.step
        units = {"units_per_step": units_per_step, "unit": unit}
        record.start(done, steps, config=config, every=log_every, profile=profile, **units)
        under_way = collections.deque[Any]()
        for step in range(done + 1, steps + 1):
            state, metrics = step_fn(state, source.batch(step - 1))
            under_way.append(metrics)
            if len(under_way) == _AHEAD:
                jax.block_until_ready(under_way.popleft())
            record.step(step, metrics)
            stopped, due = stop.reached(step), step % save_every == 0 or step == steps
            if due or stopped:
                run.check_finite(step, metrics)
                if due and evaluate is not None:
                    with record.paused():
                        found = evaluate(state)
                    record.write(step, found)
                saved.save(step, state, source.position(step))
            if stopped:
                print(f"Stopped after step {step}: saved; the same command goes on.")
                return None
        if stop.reached(steps + 1):
            print(f"Stopped after step {steps}, the last: saved; the same command goes on.")
            return None
    return state
