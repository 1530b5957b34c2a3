"""The experiment in small: it learns what is to be seen, goes on where it stopped, and refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import trained, vision, vit
from jaxformer.models.vit import ViTConfig
from jaxformer.training import checkpoint, images

MODEL = ViTConfig((8, 12), (4, 4), 1, 16, 1, 2, 16, num_classes=2)


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """Images of a bar that lies or stands."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 40, (80, 8, 12)).astype(np.uint8), np.arange(80) % 2
    for image, stands in zip(x, y):
        at = random.integers(1, 7)
        image[(slice(None), at) if stands else (at,)] = 255
    path = tmp_path_factory.mktemp("images") / "bars.npz"
    np.savez(path, x=x, y=y, label_names=np.array(["lies", "stands"]))
    return f"npz:{path}"


def config(folder, origin, **changes):
    settings = {"run": str(folder), "data": origin, "model": MODEL, "steps": 60, "batch": 32}
    settings |= {"distort": "none", "warmup": 5, "save_every": 30, "log_every": 5, "ema": 0.8}
    return vit.Config(**settings | {"mesh": "data=1"} | changes)


@pytest.fixture(scope="module")
def whole(bars, untouched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert vit.main(config(folder, bars)) == 0
    return folder


def test_a_run_learns_and_leaves_report_and_pictures(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["test accuracy %"] == 100
    assert report["steps"] == 60
    assert report["test images"] > 3
    for name in ("loss", "attention"):
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_trained_model_can_be_taken_out_of_the_folder(whole, bars, tmp_path):
    model, variables = trained.load(whole)
    assert model.config == MODEL
    seen = images.load(bars)
    light = vision.centred(vision.light(jnp.asarray(seen.test_images)))
    said = model.apply(variables, light, method="logits").argmax(axis=-1)
    np.testing.assert_array_equal(said, seen.test_labels)
    with pytest.raises(FileNotFoundError, match="when it is finished"):
        trained.load(tmp_path)


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, bars, tmp_path, stopped):
    cfg = config(tmp_path, bars)
    stopped(vit, cfg, 7)
    assert vit.main(cfg) == 0
    for name in ("metrics.jsonl", "report.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"smoothing: 0\.05 there, 0\.1 here"):
        vit.main(dataclasses.replace(cfg, smoothing=0.1))


@pytest.mark.parametrize("kind", ["ink", "photo", "none"])
def test_changed_images_keep_their_labels_or_mix_them_alike(kind):
    x = jnp.asarray(np.random.default_rng(0).random((6, 8, 12, 1)), jnp.float32)
    y = jax.nn.one_hot(jnp.arange(6), 6)
    moved, wanted = vit.distorted(jax.random.key(0), x, y, kind)
    assert moved.shape == x.shape
    assert bool((moved == x).all()) == (kind == "none")
    assert bool((wanted == y).all()) == (kind != "photo")
    np.testing.assert_allclose(wanted.sum(axis=1), 1, atol=1e-6)


def test_what_cannot_be_learned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        config(tmp_path, "embedded", steps=0)
    (tmp_path / "unsorted").mkdir()
    for n in range(20):
        Image.fromarray(np.full((8, 12), n, np.uint8)).save(tmp_path / f"unsorted/{n}.png")
    with pytest.raises(ValueError, match="no classes to tell apart"):
        vit.main(config(tmp_path, f"folder:{tmp_path}/unsorted"))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="PNG or JPEG"):
        vit.main(config(tmp_path, f"folder:{tmp_path}/pictures"))
