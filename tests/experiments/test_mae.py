"""The experiment in small: what is hidden, what it costs, and what a run leaves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mae, mae_report, trained, vision
from jaxformer.models.mae import MAE, MAEConfig
from jaxformer.ops import patch_masks, patches
from jaxformer.training import checkpoint

ENCODER = dataclasses.replace(mae._ENCODER, width=16, num_layers=1, num_heads=2, hidden=16)
SIZED = dataclasses.replace(ENCODER, size=(28, 20))
MODEL = MAE(MAEConfig.of(SIZED, 8, 1, 2))
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 20, 1)).astype(np.uint8)


def config(folder, origin, **changes):
    settings = {"run": str(folder), "data": origin, "encoder": ENCODER, "decoder": (8, 1, 2)}
    settings |= {"steps": 20, "batch": 16, "warmup": 2, "save_every": 10, "log_every": 5}
    return mae.Config(**settings | {"mesh": "data=1"} | changes)


@pytest.fixture(scope="module")
def whole(noise, untouched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert mae.main(config(folder, noise)) == 0
    return folder


@pytest.fixture(scope="module")
def params(draw):
    one = jnp.zeros((3, 1), int)
    return draw(MODEL, jnp.zeros(PIXELS.shape), one, one)


def test_a_run_leaves_report_and_pictures(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["shown patches"] == "8 of 35"
    assert 15 < report["of those of all patches %"] < 100 * 9 / 36
    for name in ("linear probe %", "untrained, linear probe %"):
        assert 0 <= report[name] <= 100
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "test_loss" in row] == [10, 20]
    for name in ("loss", "filled"):
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    model, variables = trained.load(whole)
    assert model.apply(variables, jnp.zeros((1, 28, 20, 1))).shape[::2] == (1, 16)


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, noise, tmp_path, stopped):
    cfg = config(tmp_path, noise)
    stopped(mae, cfg, 7)
    assert mae.main(cfg) == 0
    for name in ("metrics.jsonl", "report.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"rate: 0\.75 there, 0\.5 here"):
        mae.main(dataclasses.replace(cfg, rate=0.5))


def test_the_loss_is_the_error_of_normalised_hidden_patches(params):
    loss, key = jax.jit(mae.make_loss(config("", ""), MODEL, train=False)), jax.random.key(5)
    found, _ = loss(params, {"images": jnp.asarray(PIXELS)}, key)
    x = vision.centred(vision.light(jnp.asarray(PIXELS)))
    split = patch_masks.hide(jax.random.split(key)[0], 3, 35)
    told = np.asarray(MODEL.apply(params, x, split.shown, split.hidden))
    errors = []
    for row in range(3):
        for place in np.asarray(split.hidden[row]):
            top, side = 4 * (place // 5), 4 * (place % 5)
            true = np.asarray(x)[row, top : top + 4, side : side + 4].ravel()
            wanted = (true - true.mean()) / true.std(ddof=1)
            errors.append(np.square(told[row, place] - wanted).mean())
    np.testing.assert_allclose(found, np.mean(errors), rtol=1e-4)


def test_filling_keeps_what_is_shown_and_the_mean_and_light_of_a_perfect_guess(params):
    split = patch_masks.hide(jax.random.key(0), 3, 35)

    class Perfect:
        config = MODEL.config

        def apply(self, params, x, shown, hidden):
            cut = patches.patchify(x, (4, 4))
            return (cut - cut.mean(-1, keepdims=True)) / cut.std(-1, ddof=1, keepdims=True)

    filled = mae_report.fill(Perfect(), params, jnp.asarray(PIXELS), split)
    np.testing.assert_allclose(filled, PIXELS / 255, atol=1e-5)
    filled = mae_report.fill(MODEL, params, jnp.asarray(PIXELS), split)
    same = patches.patchify(jnp.abs(filled - PIXELS / 255), (4, 4)).max(axis=-1) < 1e-5
    np.testing.assert_array_equal(same, ~np.asarray(split.mask))


def test_operations_are_those_of_the_shown_patches(params):
    few, all_ = (mae_report.operations(MODEL, params, shown) for shown in (8, 35))
    weights = 16 * (4 * 16 + 2 * 16)
    least = 2 * (9 * (weights + 2 * 9 * 16) + 8 * 16 * 16)
    assert least < few < 1.5 * least
    assert (9 / 36) ** 2 < few / all_ < 9 / 36


def test_what_cannot_be_learned_is_refused(noise, tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        config(tmp_path, noise, steps=0)
    with pytest.raises(ValueError, match=r"shows 0 of P=35 patches at rate=0\.99"):
        mae.main(config(tmp_path, noise, rate=0.99))
    with pytest.raises(ValueError, match="do not divide an image of 30×30"):
        mae.main(config(tmp_path, noise, size=30))
