"""The experiment in small: who learns what from whom, the crops, and that collapse ends a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dino, dino_loss, dino_views, trained, vision
from jaxformer.analysis import representation
from jaxformer.models.dino import DINO, DINOConfig
from jaxformer.models.vit import ViTConfig
from jaxformer.ops import distillation, spreading
from jaxformer.training import checkpoint
from jaxformer.training.state import TrainState

ENCODER = ViTConfig(
    *((28, 20), (4, 4), 1, 16, 1, 2, 16),
    **{"mask_token": True, "registers": 3, "gated": True, "activation": "silu"},
)
MODEL = DINOConfig(ENCODER, prototypes=11, hidden=13, bottleneck=7)
VIEWS = dino_views.Views(side=8, small=3)
cut = jax.jit(dino_views.crops, static_argnums=0)
CENTRE = dino_loss.Objective("centre", ibot=0.7, koleo=0.3)


def config(folder, origin, **changes):
    settings = {"run": str(folder), "data": origin, "model": MODEL, "views": VIEWS}
    settings |= {"loss": CENTRE, "steps": 10, "batch": 8, "warmup": 2, "save_every": 5}
    return dino.Config(**settings | {"log_every": 5, "mesh": "data=1"} | changes)


@pytest.fixture(scope="module")
def whole(noise, untouched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert dino.main(config(folder, noise)) == 0
    return folder


def test_a_run_leaves_report_and_pictures(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["rank of width %"] == pytest.approx(100 * report["rank"] / 16)
    for name in ("20 neighbours %", "untrained, 20 neighbours %"):
        assert 0 <= report[name] <= 100
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rank" in row] == [5, 10]
    for name in ("loss", "neighbours", "attention", "crops"):
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    model, variables = trained.load(whole)
    assert model.apply(variables, jnp.zeros((1, 28, 20, 1))).shape[::2] == (1, 16)


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, noise, tmp_path, stopped):
    cfg = config(tmp_path, noise)
    stopped(dino, cfg, 3)
    assert dino.main(cfg) == 0
    for name in ("metrics.jsonl", "report.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="batch: 8 there, 4 here"):
        dino.main(dataclasses.replace(cfg, batch=4))


@pytest.mark.parametrize("targets", ["sinkhorn", "centre"])
def test_the_loss_is_that_of_all_pairs_of_crops_and_of_hidden_patches(targets, draw):
    objective = dataclasses.replace(CENTRE, targets=targets)
    model, random = DINO(MODEL), np.random.default_rng(0)
    apply = jax.jit(model.apply)
    pixels = random.integers(0, 256, (5, 28, 20, 1)).astype(np.uint8)
    batch = dino_views.hide(VIEWS, (7, 5))({"images": pixels}, random)
    hidden, key = jnp.asarray(batch["hidden"]), jax.random.key(1)
    x = vision.light(jnp.asarray(pixels))
    large, small = cut(VIEWS, jax.random.split(key, 3)[0], x)
    large, small = (vision.centred(c).swapaxes(0, 1) for c in (large, small))
    every = jnp.broadcast_to(jnp.arange(35)[None], (5, 35))
    options = {"hidden": hidden[:, 0]}
    params, teacher = (draw(model, x, every, seed=seed, **options) for seed in (0, 1))
    old = [apply(teacher, crop, every) for crop in large]
    new = [apply(params, c, every, hidden=hidden[:, i]) for i, c in enumerate(large)]
    new += [apply(params, crop) for crop in small]
    centres = None
    if targets == "centre":
        centres = {name: jnp.asarray(random.normal(size=11)) for name in ("tokens", "patches")}

    tokens = jnp.stack([out.tokens for out in old])
    asked = hidden.swapaxes(0, 1)  # by crop, as all below
    rows = jnp.stack([out.patches for out in old])[asked]
    start = objective.temperatures[0]
    if centres is None:
        classes = distillation.sinkhorn(tokens.reshape(10, 11), start).reshape(2, 5, 11)
        hints = distillation.sinkhorn(rows, start)
    else:
        classes = jax.nn.softmax((tokens - centres["tokens"][None, None]) / start)
        hints = jax.nn.softmax((rows - centres["patches"][None]) / start)
    told = [jax.nn.log_softmax(out.tokens / 0.1) for out in new]
    pairs = [(i, j) for i in range(2) for j in range(5) if i != j]
    agreed = np.mean([-(classes[i] * told[j]).sum(-1).mean() for i, j in pairs])
    guessed = jax.nn.log_softmax(jnp.stack([out.patches for out in new[:2]])[asked] / 0.1)
    weights = (asked / jnp.maximum(asked.sum(-1, keepdims=True), 1))[asked] / 10
    filled = -((hints * guessed).sum(-1) * weights).sum()
    apart = np.mean([spreading.koleo(out.features) for out in new[:2]])

    state = TrainState(jnp.zeros((), int), params, None, key, teacher, centres)
    loss = jax.jit(dino_loss.make_loss(objective, VIEWS, model, 9, "float32"))
    found, (terms, extra) = loss(params, batch, key, state)
    for name, value in {"dino": agreed, "ibot": filled, "koleo": apart}.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4)
    np.testing.assert_allclose(found, agreed + 0.7 * filled + 0.3 * apart, rtol=1e-4)
    if centres is None:
        assert extra is None
    else:
        for name, seen in {"tokens": tokens.mean((0, 1)), "patches": rows.mean(0)}.items():
            np.testing.assert_allclose(extra[name], 0.9 * centres[name] + 0.1 * seen, atol=1e-5)


@pytest.mark.parametrize(("kind", "channels"), [("ink", 1), ("photo", 3)])
def test_crops_are_all_different_and_within_light(kind, channels):
    x = jax.random.uniform(jax.random.key(0), (2, 28, 20, channels))
    views = dataclasses.replace(VIEWS, kind=kind)
    large, small = cut(views, jax.random.key(1), x)
    assert large.shape == (2, 2, 28, 20, channels)
    assert small.shape == (2, 3, 8, 8, channels)
    for crops in (large, small):
        assert 0 <= crops.min() <= crops.max() <= 1 + 1e-6
        rows = np.asarray(crops).reshape(-1, *crops.shape[2:])
        assert len(np.unique(rows.round(5), axis=0)) == len(rows)
    none = dataclasses.replace(views, small=0)
    _, small = jax.eval_shape(lambda x: dino_views.crops(none, jax.random.key(1), x), x)
    assert small.shape == (2, 0, 8, 8, channels)


def test_patches_are_hidden_in_half_of_the_large_crops():
    hide = dino_views.hide(dataclasses.replace(VIEWS, hidden=(0.2, 0.4)), (7, 5))
    batch = hide({"images": np.zeros((6, 28, 20, 1), np.uint8)}, np.random.default_rng(0))
    counts = batch["hidden"].sum(-1)
    assert (counts > 0).sum() == 6
    assert counts.max() <= 14
    named = (batch["places"][..., None] == np.arange(35)).any(2)
    np.testing.assert_array_equal(named, batch["hidden"])


def test_what_cannot_be_learned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        config(tmp_path, "embedded", batch=1)
    with pytest.raises(ValueError, match="10"):
        config(tmp_path, "embedded", views=dataclasses.replace(VIEWS, side=10))
    with pytest.raises(ValueError, match="small=-1"):
        dataclasses.replace(VIEWS, small=-1)
    with pytest.raises(ValueError, match="no range of shares"):
        dataclasses.replace(VIEWS, hidden=(0.5, 0.2))


def test_without_a_centre_that_moves_the_run_collapses_and_says_so(noise, tmp_path):
    moving = dino_loss.Objective("centre", momentum=0.9)
    still = dataclasses.replace(moving, momentum=1.0, temperatures=(1.0, 1.0), koleo=0.0)
    rates = {"learning_rate": 0.2, "adam_learning_rate": 0.2, "steps": 40, "teacher": (0.5, 0.5)}
    numbers = {"least_rank": 0.1, **rates}
    assert dino.main(config(tmp_path / "moving", noise, loss=moving, **numbers)) == 0
    with pytest.raises(representation.Collapsed, match="the representation has collapsed"):
        dino.main(config(tmp_path / "still", noise, loss=still, **numbers))
