"""The experiment in small: what is predicted from what, and that collapse ends a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ijepa, ijepa_loss, trained, vision
from jaxformer.analysis import representation
from jaxformer.models.jepa import JEPA, JEPAConfig
from jaxformer.ops import norms, reconstruction, spreading
from jaxformer.training import checkpoint
from jaxformer.training.state import TrainState

ENCODER = dataclasses.replace(ijepa._ENCODER, width=16, num_layers=1, num_heads=2, hidden=16)


def config(folder, origin, **changes):
    settings = {"run": str(folder), "data": origin, "encoder": ENCODER, "predictor": (8, 1, 2)}
    settings |= {"steps": 20, "batch": 16, "warmup": 2, "save_every": 10, "log_every": 5}
    return ijepa.Config(**settings | {"mesh": "data=1"} | changes)


@pytest.fixture(scope="module")
def whole(noise, untouched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert ijepa.main(config(folder, noise)) == 0
    return folder


def test_a_run_leaves_report_and_pictures(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["rank of width %"] == pytest.approx(100 * report["rank"] / 16)
    for name in ("linear probe %", "untrained, linear probe %"):
        assert 0 <= report[name] <= 100
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rank" in row] == [10, 20]
    for name in ("loss", "neighbours", "blocks"):
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    model, variables = trained.load(whole)
    assert model.apply(variables, jnp.zeros((1, 28, 20, 1))).shape[::2] == (1, 16)


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, noise, tmp_path, stopped):
    cfg = config(tmp_path, noise)
    stopped(ijepa, cfg, 7)
    assert ijepa.main(cfg) == 0
    for name in ("metrics.jsonl", "report.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="batch: 16 there, 8 here"):
        ijepa.main(dataclasses.replace(cfg, batch=8))


def test_the_loss_is_that_of_one_block_of_one_image_after_the_other(draw):
    encoder = dataclasses.replace(ENCODER, size=(28, 20), class_token=True)
    model = JEPA(JEPAConfig.of(encoder, 8, 1, 2))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 28, 20, 1)).astype(np.uint8)
    batch = ijepa_loss.hide((7, 5))({"images": pixels}, random)
    assert (batch["shown"] == 35).any()
    assert (batch["targets"] == 35).any()
    x = vision.centred(vision.light(jnp.asarray(pixels)))
    one = jnp.zeros((2, 1), int)
    params, teacher = (draw(model, x, one, one, seed=seed) for seed in (0, 1))
    wanted = norms.layer_norm(model.apply(teacher, x, method="encode")[:, encoder.prefix :])
    errors, means = [], []
    for row, (shown, targets) in enumerate(zip(batch["shown"], batch["targets"])):
        keep = jnp.asarray(shown[shown < 35])[None]
        seen = model.apply(params, x[row : row + 1], keep=keep, method="encode")
        means.append(seen[0, encoder.prefix :].mean(axis=0))
        for target in targets:
            aims = jnp.asarray(target[target < 35])[None]
            told = model.apply(params, seen, keep, aims, method="predict")
            errors.append(reconstruction.smooth_l1(told[0], wanted[row, aims[0]]))
    state = TrainState(jnp.zeros((), int), params, None, jax.random.key(0), teacher)
    loss = jax.jit(ijepa_loss.make_loss(model, variance=0.3, covariance=0.2))
    total, (terms, _) = loss(params, batch, jax.random.key(0), state)
    np.testing.assert_allclose(terms["error"], np.concatenate(errors).mean(), rtol=1e-5)
    for name in ("variance", "covariance"):
        want = getattr(spreading, f"{name}_term")(jnp.stack(means))
        np.testing.assert_allclose(terms[name], want, rtol=1e-3)
    want = terms["error"] + 0.3 * terms["variance"] + 0.2 * terms["covariance"]
    np.testing.assert_allclose(total, want, rtol=1e-5)


def test_collapse_ends_the_run_and_is_named(noise, tmp_path):
    spoilt = {"teacher": (0.0, 0.0), "learning_rate": 1.0, "adam_learning_rate": 1.0}
    spoilt |= {"variance": 0.0, "covariance": 0.0, "least_rank": 0.5}
    cfg = config(tmp_path, noise, **spoilt)
    with pytest.raises(representation.Collapsed, match="the representation has collapsed"):
        ijepa.main(cfg)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch": 1}, "batch must be at least 2, got 1"),
        ({"teacher": (0.9, 1.1)}, r"shares in \[0, 1\], got teacher=\(0\.9, 1\.1\)"),
    ],
)
def test_nonsense_is_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, "embedded", **changes)
