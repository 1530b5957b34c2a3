"""A run's folder tells the truth: after a restart, after a kill, and when two runs want it."""

import dataclasses
import enum
import gzip
import json
import math
import pathlib
import signal
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxformer.training import progress, records, run


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 7
    where: pathlib.Path = pathlib.Path("a/b")


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = dataclasses.field(default_factory=Inner)
    sizes: tuple[int, ...] = (2, 3)
    rate: float = 1e-3
    name: str | None = None
    colour: Colour = Colour.RED


def loss_at(step):
    return jnp.asarray(5.0 / step, jnp.float32)


def train(folder, *, done=0, until, total=20, every=4, **arguments):
    """Runs steps done + 1 to `until`, logging each, and an evaluation at every eighth."""
    with run.Run(folder) as record:
        record.start(done, total, units_per_step=3, config=Config(), every=every, **arguments)
        for step in range(done + 1, until + 1):
            record.step(step, {"loss": loss_at(step), "rate": 0.5})
            if step % 8 == 0:
                record.write(step, {"eval/nats": loss_at(step) + 1})
    return folder


def events(folder):
    """Every event of a TensorBoard folder, in order: records are length, crc, bytes, crc."""
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), until=20)


def test_rows_are_written_at_the_first_step_every_nth_and_the_last(whole):
    rows = records.read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 4, 8, 12, 16, 20]
    assert rows[0] == {"step": 1, "loss": 5.0, "rate": 0.5}
    assert [row for row in rows if "eval/nats" in row] == [
        {"step": 8, "eval/nats": 1.625},
        {"step": 16, "eval/nats": 1.3125},
    ]


@pytest.mark.parametrize("seen", [9, 14])
def test_a_resumed_run_writes_the_metrics_of_an_unbroken_one_byte_for_byte(whole, seen, tmp_path):
    train(tmp_path, until=seen)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 15, "lo')  # the kill came in the middle of a line
    train(tmp_path, done=8, until=20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_new_run_in_an_old_folder_starts_from_nothing(whole, tmp_path):
    train(tmp_path, until=11)
    train(tmp_path, until=20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_tensorboard_hides_the_points_that_a_resumed_run_writes_again(tmp_path):
    train(tmp_path, until=14)
    train(tmp_path, done=8, until=20)
    found = events(tmp_path / "tensorboard")
    starts = [e.step for e in found if e.session_log.status == SessionLog.START]
    assert starts == [1, 9]  # at a START, points from its step on are dropped
    losses = [e.step for e in found for v in e.summary.value if v.tag == "loss"]
    assert losses == [1, 4, 8, 12, 12, 16, 20]
    speeds = [v.simple_value for e in found for v in e.summary.value if "_per_second" in v.tag]
    assert len(speeds) == 6  # not the first step, which compiles
    assert min(speeds) > 0


def test_steps_between_logged_ones_never_touch_the_device(tmp_path):
    class Untouchable:
        def __array__(self, *_, **__):
            raise AssertionError("fetched")

        def block_until_ready(self):
            raise AssertionError("waited for")

    with run.Run(tmp_path) as record:
        record.start(0, 10, units_per_step=1, config={}, every=5)
        record.step(1, {"loss": loss_at(1)})
        for step in (2, 3, 4):
            record.step(step, {"loss": Untouchable()})
        with pytest.raises(AssertionError, match="fetched"):
            record.step(5, {"loss": Untouchable()})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_written(bad, tmp_path):
    with run.Run(tmp_path) as record:
        record.start(0, 10, units_per_step=1, config={}, every=2)
        record.step(1, {"loss": loss_at(1)})
        with pytest.raises(run.TrainingDiverged, match=r"gradient_norm is (nan|inf) at step 2"):
            record.step(2, {"loss": loss_at(2), "gradient_norm": jnp.asarray(bad)})
    assert [row["step"] for row in records.read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_metrics_of_any_dtype_become_numbers_and_arrays_are_refused():
    values = {"a": jnp.asarray(0.5, jnp.bfloat16), "b": jnp.asarray(3), "c": 0.1, "d": np.int64(2)}
    assert run.check_finite(1, values) == {"a": 0.5, "b": 3, "c": 0.1, "d": 2}
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
        run.check_finite(1, {"loss": jnp.zeros(2)})


def test_the_configuration_is_written_as_plain_json(whole):
    assert json.loads((whole / "config.json").read_text()) == {
        "inner": {"width": 7, "where": "a/b"},
        "sizes": [2, 3],
        "rate": 1e-3,
        "name": None,
        "colour": "RED",
    }


def test_what_json_cannot_hold_is_named():
    assert records.plain({"dtype": np.dtype("int8"), "act": jax.nn.relu.__wrapped__})["dtype"] == (
        "int8"
    )
    assert records.plain(jnp.bfloat16).endswith("bfloat16")
    assert records.plain({"x": np.arange(3), "y": jnp.float32(2)}) == {"x": [0, 1, 2], "y": 2.0}
    with pytest.raises(ValueError, match="of type object"):
        records.plain({"x": object()})


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    records.write_json(path, {"nats": 61.5})
    with pytest.raises(ValueError):
        records.write_json(path, {"nats": math.nan})
    assert json.loads(path.read_text()) == {"nats": 61.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_line_that_is_no_row_is_named_unless_it_is_the_last_and_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert records.read_metrics(path) == [{"step": 1}, {"step": 2}]
    for broken in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n[2]\n', '{"a": 1}\n'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"metrics.jsonl, line [12]: not a JSON object"):
            records.cut_metrics(path, 9)
        assert path.read_text() == broken


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone_even_by_kill(tmp_path):
    script = (
        "import sys; from jaxformer.training import run\n"
        "record = run.Run(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(run.FolderInUse, match=f"in use by process {other.pid}"):
            run.Run(tmp_path)
        other.send_signal(signal.SIGKILL)
    run.Run(tmp_path).close()


def test_one_process_cannot_open_a_folder_twice_but_again_after_closing(tmp_path):
    with run.Run(tmp_path) as record:
        with pytest.raises(run.FolderInUse):
            run.Run(tmp_path)
        record.close()
        run.Run(tmp_path).close()


def test_the_profile_holds_the_steps_asked_for(tmp_path):
    with run.Run(tmp_path) as record:
        record.start(3, 20, units_per_step=1, config={}, every=50, profile=(3, 5))
        for step in range(4, 15):
            with jax.profiler.TraceAnnotation(f"step {step}"):
                loss = loss_at(step)
            record.step(step, {"loss": loss})
    (trace,) = (tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.trace.json.gz")
    seen = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in seen}
    assert {name for name in names if name.startswith("step ")} == {"step 6", "step 7", "step 8"}


def test_a_profile_longer_than_the_run_is_written_at_its_end(tmp_path):
    train(tmp_path, until=5, profile=(1, 100))
    assert list(tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def test_arguments_out_of_range_are_named_in_the_error(tmp_path):
    for arguments, match in (
        ({"every": 0}, "every=0"),
        ({"done": 21, "until": 21}, "done=21, total_steps=20"),
        ({"profile": (0, 3)}, r"\(0, 3\)"),
        ({"profile": (4, 3)}, r"\(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            train(tmp_path, **{"until": 3} | arguments)


def test_without_a_terminal_progress_is_plain_lines(tmp_path, capsys):
    train(tmp_path, until=20, unit="digits")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step  1/20  loss 5.0000"
    assert len(lines) == 6
    assert lines[-1].startswith("step 20/20  loss 0.2500  ")
    assert lines[-1].endswith("digits/s  left 0:00:00")


def test_on_a_terminal_progress_is_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    train(tmp_path, until=20, unit="digits")
    shown = capsys.readouterr().out
    assert "20/20" in shown
    assert "loss 0.2500" in shown
    assert "\x1b[" in shown


def test_the_clock_leaves_out_the_first_step_and_pauses():
    times = iter([100.0, 110.0, 112.0, 117.0, 120.0])
    clock = progress.Clock(0, 40, units_per_step=3, now=lambda: next(times))
    assert clock.tick(1) == (None, None)  # 100: compiling took whatever it took
    rate, left = clock.tick(11)  # 110
    assert rate == pytest.approx(10 * 3 / 10)
    assert left == pytest.approx(29 * 1.0)
    with clock.paused():  # 112 to 117
        pass
    rate, left = clock.tick(21)  # 120, 5 of them paused
    assert rate == pytest.approx(10 * 3 / 5)
    assert left == pytest.approx(19 * 20 / 20)


def test_the_compile_cache_is_filled_even_when_something_was_compiled_before(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.jit(lambda x: x + 1)(1.0)
        assert run.enable_compile_cache(tmp_path / "a" / "xla") == tmp_path / "a" / "xla"
        jax.jit(lambda x: x * 3.7 + 1)(1.0)
        assert list((tmp_path / "a" / "xla").iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        run.compilation_cache.reset_cache()


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    assert run.enable_compile_cache(tmp_path / "file" / "xla") is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert run.enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir == before


def test_importing_costs_nothing_beyond_jax():
    script = (
        "import sys, jax; from jaxformer.training import run\n"
        "print([m for m in ('rich', 'tensorboardX', 'matplotlib', 'flax') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert printed.stdout == b"[]\n"


def test_a_table_has_names_and_values_in_two_columns():
    figures = {"data": "embedded", "nats per digit": 65.123456, "steps": 4000}
    assert records.table(figures).splitlines() == [
        "data             embedded",
        "nats per digit   65.12",
        "steps            4000",
    ]
    assert records.table({}) == ""


def test_a_setting_below_the_least_is_named():
    config = types.SimpleNamespace(steps=3, batch=1)
    run.check_least(config, steps=3, batch=1)
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        run.check_least(config, steps=3, batch=2)
