"""The latent world model in small: what it may see, how it is measured, and what stops it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import ball, jepa_world
from experiments import jepa_world_report as report
from experiments.jepa_world import Config
from experiments.latent_world import LatentWorld, LatentWorldConfig, dream, encode
from jaxformer.analysis import representation

MODEL = LatentWorldConfig(side=12, patch=6, vector=7, width=8, num_layers=1, num_heads=2)
TINY = Config(
    model=MODEL, context=4, ahead=2, flights=64, steps=4, batch=6, warmup=1, mesh="data=1"
)


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Leaves this process's cache and memory as they are."""


@pytest.fixture(scope="module")
def world():
    """A model, its parameters, and flights of its size."""
    model = LatentWorld(MODEL)
    flights = ball.sequences(jax.random.key(1), 3, 4 + report.FAR, box=TINY.box)
    return model, model.init(jax.random.key(0), flights.frames[:1, :4]), flights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("jepa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "unseen_flights", few)
        assert jepa_world.main(dataclasses.replace(TINY, run=str(folder), save_every=2)) == 0
    return folder


def few(box, context, seed):
    return jax.device_get(ball.sequences(jax.random.key(seed), 24, context + report.FAR, box=box))


def test_a_frame_becomes_a_vector_by_itself(world):
    model, params, flights = world
    whole = encode(model, params, flights.frames[:, :4])
    alone = encode(model, params, flights.frames[:, 2:3])
    np.testing.assert_allclose(whole[:, 2:3], alone, atol=1e-5)
    assert whole.shape == (3, 4, 7)


def test_a_dream_goes_on_from_its_own_vectors(world):
    model, params, flights = world
    vectors = encode(model, params, flights.frames[:, :4])
    told = dream(model, params, vectors, 3)
    window = vectors
    for step in range(3):
        want = model.apply(params, window, method="predict")
        np.testing.assert_allclose(told[:, step], want, atol=1e-5)
        window = jnp.concatenate([window[:, 1:], want[:, None]], axis=1)


def test_the_loss_is_about_frames_that_only_the_teacher_sees(world):
    model, params, flights = world
    teacher = jax.tree.map(lambda x: 0.5 * x, params)
    state = jepa_world.TrainState(jnp.array(0), params, None, jax.random.key(0), teacher)
    loss = jepa_world.make_loss(dataclasses.replace(TINY, variance=3.0, covariance=2.0), model)
    states = flights.states[:, :6]
    total, (terms, _) = loss(params, {"states": states}, jax.random.key(0), state)
    frames = ball.render(TINY.box, states[..., :2])
    told = dream(model, params, encode(model, params, frames[:, :4]), 2)
    error = np.square(told - encode(model, teacher, frames[:, 4:])).mean()
    np.testing.assert_allclose(terms["error"], error, rtol=1e-5)
    parts = error + 3 * terms["variance"] + 2 * terms["covariance"]
    np.testing.assert_allclose(total, parts, rtol=1e-5)

    def only_future(future):
        moved = jnp.concatenate([states[:, :4], future], axis=1)
        return loss(params, {"states": moved}, jax.random.key(0), state)[1][0]

    influence = jax.jacobian(only_future)(states[:, 4:])
    assert np.abs(influence["error"]).max() > 0
    assert np.abs(influence["variance"]).max() == 0


def test_the_probe_finds_a_linear_rule_and_is_fitted_to_seen_frames_alone():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(40, report.FAR + 6, 4))
    seen = states @ rng.normal(size=(4, 7)) + 3.0
    told = {"seen": seen, "JEPA": seen.copy(), "random": rng.normal(size=seen.shape)}
    told["JEPA"][:, 16:] = seen[:, 15:16]
    found = report.read(told, states, context=6)
    truth = states[20:, 5:]
    r2 = {name: report.explained(x, truth) for name, x in found.items()}
    assert r2["seen"].shape == (2, report.FAR + 1)
    assert r2["seen"].min() > 0.99
    assert r2["JEPA"][:, :11].min() > 0.99
    assert r2["JEPA"][:, 11:].max() < 0.5
    assert r2["random"].max() < 0.5
    np.testing.assert_allclose(r2["persistence"][:, 0], r2["JEPA"][:, 0])
    assert r2["persistence"][:, 1:].max() < 0.5


def test_r2_is_0_for_the_mean_and_1_for_the_truth():
    truth = np.random.default_rng(1).normal(size=(31, 3, 4))
    mean = np.broadcast_to(truth.mean(axis=0), truth.shape)
    np.testing.assert_allclose(report.explained(mean, truth), 0, atol=1e-12)
    mixed = np.concatenate([truth[..., :2], mean[..., 2:]], axis=-1)
    np.testing.assert_allclose(report.explained(mixed, truth), [[1.0] * 3, [0.0] * 3], atol=1e-12)


def test_a_run_leaves_report_and_pictures(finished):
    figures = json.loads((finished / "report.json").read_text())
    for name in ("seen", "JEPA", "random", "persistence"):
        by_horizon = figures[f"{name}_position_by_horizon"]
        assert len(by_horizon) == report.FAR + 1
        assert by_horizon[-1] == figures[f"{name}_position"] <= 1
    assert 1 < figures["rank"] <= MODEL.vector
    for name in ("r2", "strip", "loss"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(row) for row in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rank" in row] == [2, 4]


def test_a_collapsed_representation_ends_the_run_with_what_to_try(tmp_path, monkeypatch):
    def constant(model, params, frames):
        return jnp.ones((*frames.shape[:2], MODEL.vector)) + 0.0 * encode(model, params, frames)

    monkeypatch.setattr(jepa_world, "encode", constant)
    cfg = dataclasses.replace(TINY, run=str(tmp_path), variance=0.0, covariance=0.0)
    with pytest.raises(representation.Collapsed, match="variance and covariance"):
        jepa_world.main(cfg)
    assert not (tmp_path / "report.json").exists()


def test_the_box_has_the_side_of_the_models_frames():
    assert TINY.box == ball.Box(side=12)
    assert Config().box == ball.Box()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "1"], "batch must be at least 2, got 1"),
        (["--context", "3"], "context must be at least 4, got 3"),
        (["--model.patch", "5"], "do not divide"),
        (["--model.side", "4", "--model.patch", "2"], "side=4"),
        (["--box.fastest", "0.1"], "self.fastest=0.1"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)
