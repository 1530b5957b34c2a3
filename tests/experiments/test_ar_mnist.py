"""The experiment in small: everything it writes, how it stops, and how it goes on."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import ar_mnist, digit_reader
from experiments import ar_mnist_report as report
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.training import checkpoint, leaves, mesh, mnist, optimizers, run

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ImageGPTConfig(width=8, num_layers=1, num_heads=1, hidden=8)
ALL = mnist.load("embedded")
DIGITS = mnist.Digits(
    ALL.train_images[:97],
    ALL.train_labels[:97],
    ALL.test_images[:100],
    ALL.test_labels[:100],
    ALL.origin,
)


def config(folder, **changes):
    settings = {"run": str(folder), "model": MODEL, "steps": 6, "batch": 8, "mesh": "data=1"}
    settings |= {"optimizer": "adamw", "warmup": 2, "save_every": 2, "log_every": 3, "distort": 0.0}
    return ar_mnist.Config(**settings | changes)


def train(cfg):
    with run.Run(cfg.run) as record:
        return ar_mnist.train(cfg, ImageGPT(cfg.model), DIGITS, mesh.make(cfg.mesh), record)


TOKENS = jnp.full((1, MODEL.cells), MODEL.vocab_size, jnp.int32)


def random_parameters(model, example):
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.4, x.shape), x.dtype), shapes)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return checkpoint.Checkpoints(folder / "checkpoints", {}).steps


@pytest.fixture
def small(monkeypatch):
    """Few digits, few draws, a judge that never learned, and this process's settings untouched."""
    monkeypatch.setattr(mnist, "load", lambda origin: DIGITS)
    monkeypatch.setattr(run, "enable_compile_cache", lambda: None)
    monkeypatch.setattr(mesh, "keep_host_memory", lambda: None)
    monkeypatch.setattr(report, "_BATCH", 100)
    written = report.written

    def fewer(reader, writer, params, count, *rest):
        assert count == 1000
        return written(reader, writer, params, 100, *rest)

    def judge(images, labels, *, ink):
        assert len(images) == len(labels) == 97
        return random_parameters(digit_reader.Reader(), jnp.zeros((1, 28, 28)))

    monkeypatch.setattr(report, "written", fewer)
    monkeypatch.setattr(digit_reader, "train_reader", judge)


def test_a_run_leaves_its_folder_and_the_same_command_does_not_train_again(
    small, tmp_path, capsys, monkeypatch
):
    cfg = config(tmp_path)
    assert ar_mnist.main(cfg) == 0
    for name in ("samples.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert saved(tmp_path) == [2, 4, 6]
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 6]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == MODEL.width
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["binarisation"] == "threshold"
    assert found["data"] == "embedded"
    assert (found["steps"], found["test_digits"], found["new_digits"]) == (6, 100, 100)
    assert 0 < found["nats_conditional"] < 196 * math.log(16)
    assert found["nats_unconditional"] > 0
    assert found["cache_speedup"] == pytest.approx(
        found["images_per_second_with_cache"] / found["images_per_second_without_cache"]
    )
    shares = {"classifier_accuracy", "reader_accuracy_on_test_digits", "new_digits_read_as_asked"}
    assert all(0 <= found[name] <= 1 for name in shares)
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)

    def forbidden(*_):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(ar_mnist, "jit_step", lambda *_: forbidden)
    evaluated = []

    def evaluate(reader, writer, params, *rest):
        evaluated.append(params)
        return {"nats": 1.0}, np.zeros((100, 28, 28), np.uint8)

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(report, "show", lambda *_: None)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert ar_mnist.main(cfg) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(evaluated) == 1


def test_training_lowers_the_loss_and_evaluates_the_average_of_the_parameters(tmp_path):
    state = train(config(tmp_path, binarisation="dynamic", distort=0.3, log_every=1))
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[0] == pytest.approx(196 * math.log(16), rel=1e-5)  # the head starts at zero
    assert losses[-1] < losses[0] - 5
    assert state.best_params is state.ema


def test_by_default_muon_has_the_hidden_kernels_and_adamw_the_rest(tmp_path):
    cfg = config(tmp_path, optimizer="muon")
    params = random_parameters(ImageGPT(MODEL), TOKENS)
    state = jax.eval_shape(ar_mnist.make_optimizer(cfg).init, params)
    momentum = {name for name in leaves.named(state) if "hidden" in name and ".mu." in name}
    assert len(momentum) == 4
    assert all(re.search(r"layers_0\..*\.(qkv|out|up|down)\.kernel$", name) for name in momentum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an unbroken run on one device, and the parameters it ends with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, jax.device_get(train(config(folder)).params)


@pytest.mark.parametrize("step", ["jit", "pmap"])
def test_eight_devices_give_the_loss_of_one(step, whole, tmp_path):
    assert train(config(tmp_path, mesh="data=8", step=step)) is not None
    for many, one in zip(rows(tmp_path), rows(whole[0]), strict=True):
        assert many == pytest.approx(one, rel=1e-4)  # Adam magnifies the rounding of tiny gradients


def test_a_run_continues_where_its_checkpoint_stands_on_any_number_of_devices(whole, tmp_path):
    folder, params = whole
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    state = train(config(tmp_path / "run", mesh="data=8"))
    assert saved(tmp_path / "run") == [2, 4, 6]
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3


def test_a_checkpoint_of_other_settings_is_refused_and_kept(whole):
    with pytest.raises(checkpoint.CheckpointError, match="batch: 8 there, 4 here"):
        train(config(whole[0], batch=4))
    assert saved(whole[0]) == [2, 4, 6]


def test_numbers_that_are_no_longer_finite_stop_the_run_and_keep_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    healthy = optimizers.warmup_cosine

    def broken_from_the_fourth_step(*arguments, **options):
        rate = healthy(*arguments, **options)
        return lambda count: jnp.where(count < 3, rate(count), jnp.nan)

    cfg = config(tmp_path, log_every=50)
    monkeypatch.setattr(optimizers, "warmup_cosine", broken_from_the_fourth_step)
    with pytest.raises(run.TrainingDiverged, match="param_norm is nan at step 4"):
        train(cfg)
    assert saved(tmp_path) == [2]
    monkeypatch.setattr(optimizers, "warmup_cosine", healthy)
    state = train(cfg)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert saved(tmp_path) == [2, 4, 6]


def test_a_signal_stops_after_a_step_with_everything_saved_even_after_the_last(
    tmp_path, monkeypatch, capsys
):
    make = ar_mnist.jit_step

    def signalled_at(which):
        def make_step(pure, devices):
            step, taken = make(pure, devices), []

            def interrupted(state, batch):
                taken.append(1)
                if len(taken) == which:
                    signal.raise_signal(signal.SIGTERM)
                return step(state, batch)

            return interrupted

        return make_step

    for which, done in ((3, 3), (3, 6)):
        monkeypatch.setattr(ar_mnist, "jit_step", signalled_at(which))
        assert train(config(tmp_path)) is None
        assert max(saved(tmp_path)) == done
        assert f"after step {done}: saved" in capsys.readouterr().out


def test_what_a_model_knows_is_computed_from_its_likelihoods():
    random = np.random.default_rng(0)
    scores = random.normal(-90, 3, (13, 10)).astype(np.float32)
    labels, prior = random.integers(10, size=13), random.dirichlet(np.ones(10))
    found = report.knowledge(scores, labels, prior)
    exact = np.exp(scores.astype(np.float64)) * prior  # p(x | c) p(c), far above underflow
    assert found["nats_conditional"] == pytest.approx(-np.mean(scores[range(13), labels]), rel=1e-6)
    assert found["nats_unconditional"] == pytest.approx(-np.mean(np.log(exact.sum(1))), rel=1e-6)
    assert found["classifier_accuracy"] == np.mean(exact.argmax(1) == labels)


def test_likelihoods_of_all_classes_are_those_of_each_image_alone(monkeypatch):
    model = ImageGPT(MODEL)
    params = random_parameters(model, TOKENS)
    monkeypatch.setattr(report, "_BATCH", 4)  # of each device; 7 images leave padding
    images = mnist.threshold(DIGITS.test_images[:7])
    found = report.class_log_likelihoods(model, params, images, mesh.make("data=2"))
    assert found.shape == (7, 10)
    bits = images.reshape(7, 14, 2, 14, 2).transpose(0, 1, 3, 2, 4).reshape(7, 196, 4)
    cells, read = bits @ np.array([8, 4, 2, 1], np.int32), jax.jit(model.apply)
    for label in (0, 7):
        tokens = np.concatenate([np.full((7, 1), 16 + label), cells[:, :-1]], axis=1)
        logits = np.asarray(read(params, tokens.astype(np.int32)), np.float64)
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each = np.take_along_axis(each, cells[..., None], axis=-1)
        np.testing.assert_allclose(found[:, label], each.sum((1, 2)), rtol=1e-5)
    assert np.abs(found[:, 0] - found[:, 7]).min() > 1e-3


def test_digits_are_the_same_whether_written_with_a_cache_or_without():
    model = ImageGPT(MODEL)
    params, classes = random_parameters(model, TOKENS), jnp.array([3, 1, 4])
    fast, slow = report.make_writer(model), report.make_slow_writer(model)
    cells = fast(params, classes, jax.random.key(5))
    assert cells.shape == (3, 196)
    assert len(np.unique(cells)) == 16
    np.testing.assert_array_equal(
        slow(params, classes, jax.random.key(5), 31)[:, :31], cells[:, :31]
    )
    assert (np.asarray(fast(params, classes, jax.random.key(6))) != cells).any()


def test_dynamic_test_digits_are_always_drawn_the_same():
    drawn = report.test_images(DIGITS, "dynamic")
    np.testing.assert_array_equal(drawn, report.test_images(DIGITS, "dynamic"))
    assert (drawn != report.test_images(DIGITS, "threshold")).any()
    assert set(np.unique(drawn)) == {0, 1}


def test_every_setting_is_written_on_the_command_line():
    cfg = tyro.cli(ar_mnist.Config, args=["--model.width", "32", "--mesh", "data=2", "--profile"])
    changed = dataclasses.replace(cfg, model=ImageGPTConfig(), mesh=None, profile=False)
    assert changed == ar_mnist.Config()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stpes", "3"], "--steps"),
        (["--binarisation", "grey"], "'threshold', 'dynamic'"),
        (["--steps", "many"], "invalid literal for int"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--mesh", "8"], "like 'data=4' or"),
        (["--distributed", "--step", "pmap"], "step=pmap is for one process"),
        (["--model.width", "63"], "D=63 is not a multiple of N=2"),
    ],
)
def test_a_wrong_flag_or_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(ar_mnist.Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.ar_mnist", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_names_the_settings_and_their_defaults():
    process = command("--help")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "python -m experiments.ar_mnist" in text
    assert "--model.num-layers INT" in text
    assert "(default: 4000)" in text


def test_sigterm_and_ctrl_c_save_and_exit_cleanly_and_the_same_command_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    sizes = {"width": 8, "num-layers": 1, "num-heads": 1, "hidden": 8}
    settings = [f"--model.{name}={size}" for name, size in sizes.items()]
    settings += ["--batch=2", "--mesh=data=1", "--optimizer=adamw", "--log-every=1"]
    settings += ["--steps=100000", f"--run={tmp_path / 'run'}"]
    begun = 0
    for sent in (signal.SIGTERM, signal.SIGINT):
        process = command(*settings)
        first = process.stdout.readline()
        assert int(re.match(r"step +(\d+)/100000", first)[1]) == begun + 1
        process.send_signal(sent)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        begun = int(re.search(r"Stopped after step (\d+): saved", rest)[1])
        assert max(saved(tmp_path / "run")) == begun
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, begun + 1))
