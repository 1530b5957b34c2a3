"""The loop of a run, with a step that counts."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.training import data, loop, run
from jaxformer.training.state import TrainState


class Counting:
    """A step that adds the batch to one number, and asks itself how many are under way."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.stop_in, self.begun = stop_in, []

    def __call__(self, state, batch):
        self.begun.append(int(state.step))
        if state.step == self.stop_in:
            signal.raise_signal(signal.SIGTERM)
        value = state.params + jnp.asarray(batch["x"]).sum()
        return TrainState(state.step + 1, value, (), state.key, None), {"loss": value}


def begin():
    key = jnp.zeros(2, jnp.uint32)
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros(()), (), key, None)


def train(folder, step_fn, *, x=None, **changes):
    x = np.arange(6, dtype=np.float32) if x is None else x
    options = {"steps": 6, "config": {"a": 1}, "meaning": {"a": 1}, "units_per_step": 2}
    options |= {"save_every": 2, "log_every": 1} | changes
    with run.Run(folder) as record:
        return loop.train(begin(), step_fn, data.InMemory({"x": x}, 2, 0), record, **options)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_steps_are_taken_and_what_is_evaluated_is_written_before_each_checkpoint(tmp_path):
    last = train(tmp_path, Counting(), evaluate=lambda state: {"twice": 2 * state.params})
    assert float(last.params) == 2 * 15  # six steps of two are two epochs
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [*range(1, 7)]
    twice = {row["step"]: row["twice"] for row in rows(tmp_path) if "twice" in row}
    loss = {row["step"]: row["loss"] for row in rows(tmp_path) if "loss" in row}
    assert twice == {step: 2 * loss[step] for step in (2, 4, 6)}


def test_a_signal_saves_and_the_next_call_goes_on(tmp_path, capsys):
    first = Counting(stop_in=2)
    assert train(tmp_path, first) is None
    assert "Stopped after step 3: saved" in capsys.readouterr().out
    second = Counting()
    assert float(train(tmp_path, second).params) == 30
    assert (first.begun, second.begun) == ([0, 1, 2], [3, 4, 5])
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 7)]


def test_a_signal_after_the_last_step_ends_the_run_too(tmp_path, capsys):
    def evaluate(state):
        if state.step == 6:
            signal.raise_signal(signal.SIGINT)
        return {}

    assert train(tmp_path, Counting(), evaluate=evaluate) is None
    assert "Stopped after step 6, the last: saved" in capsys.readouterr().out
    again = Counting()
    assert float(train(tmp_path, again).params) == 30
    assert again.begun == []


def test_a_run_that_is_complete_trains_no_more(tmp_path):
    train(tmp_path, Counting())
    again = Counting()
    assert float(train(tmp_path, again).params) == 30
    assert again.begun == []


def test_other_data_are_refused(tmp_path):
    train(tmp_path, Counting(stop_in=1))
    with pytest.raises(ValueError, match="records was 6, is 8"):
        train(tmp_path, Counting(), x=np.arange(8, dtype=np.float32))


def test_what_is_not_finite_is_not_saved(tmp_path):
    x = np.array([0, 1, 2, 3, 4, np.nan], np.float32)
    with pytest.raises(run.TrainingDiverged):
        train(tmp_path, Counting(), x=x, log_every=6, save_every=3)
    assert not [entry for entry in (tmp_path / "checkpoints").glob("[0-9]*")]


def test_no_more_than_two_steps_are_under_way(tmp_path, monkeypatch):
    events, step = [], Counting()

    def counted(state, batch):
        events.append("begun")
        return step(state, batch)

    wait = loop.jax.block_until_ready
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda x: events.append("waited") or wait(x))
    train(tmp_path, counted, log_every=6, save_every=6)
    ahead = np.cumsum([1 if event == "begun" else -1 for event in events])
    assert ahead.max() == 2
