"""The experiment in small: everything it writes, and that it goes on as if it had not stopped."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import captions, vqvae, vqvae_report
from jaxformer.models.vqvae import ConvCoder, ViTCoder
from jaxformer.tokenizers import vq
from jaxformer.training import images, mesh, run

ALL = images.load("embedded")
DIGITS = images.Images(
    ALL.train_images[:97],
    ALL.train_labels[:97],
    ALL.test_images[:60],
    ALL.test_labels[:60],
    ALL.label_names,
    ALL.origin,
)


def config(folder, **changes):
    settings = {"run": str(folder), "levels": (3, 4), "width": 2, "steps": 4, "batch": 8}
    settings |= {"conv": ConvCoder(4, 3, 1), "vit": ViTCoder(4, 1, 1, 5), "mesh": "data=1"}
    settings |= {"warmup": 1, "save_every": 2, "log_every": 2}
    return vqvae.Config(**settings | changes)


def train(cfg):
    with run.Run(cfg.run) as record:
        return vqvae.train(cfg, DIGITS, mesh.make(cfg.mesh), record).variables


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_tokenizer_a_report_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "load", lambda origin, size: DIGITS)
    monkeypatch.setattr(vqvae_report, "_ROUNDS", 2)
    assert vqvae.main(config(tmp_path, quantizer="vq_ema")) == 0
    for name in ("images.png", "codes.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["codes"] == 12
    assert report["bits_per_image"] == report["kmeans_bits_per_image"] == 49 * np.log2(12)
    ratio = report["distortion"] / report["kmeans_distortion"]
    assert report["distortion_over_kmeans"] == pytest.approx(ratio)
    assert report["perplexity_share"] == report["perplexity"] / 12
    assert all(name in capsys.readouterr().out for name in [*report][:1])
    tokenizer = vq.load(tmp_path / "tokenizer")
    test = captions.light(DIGITS.test_images)
    assert tokenizer.distortion(test) == pytest.approx(report["distortion"])
    ids = tokenizer.encode(test)
    assert len(np.unique(ids)) == report["codes_in_use"]
    drawn = vqvae_report.codes_drawn(tokenizer, test, (4, 4)).reshape(-1, 4, 4)
    first = np.bincount(ids.ravel()).argmax()
    patches = tokenizer.decode(ids).reshape(60, 7, 4, 7, 4).swapaxes(2, 3).reshape(-1, 4, 4)
    expected = patches[ids.ravel() == first].mean(0)
    np.testing.assert_allclose(drawn[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("quantizer", "architecture"), [("vq", "conv"), ("fsq", "vit"), ("gumbel", "conv")]
)
def test_every_choice_trains(quantizer, architecture, tmp_path):
    cfg = config(tmp_path, quantizer=quantizer, architecture=architecture, distort=0.5)
    variables = train(cfg)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 4, 4]
    assert rows(tmp_path)[-1]["test_distortion"] > 0


def test_a_run_goes_on_with_its_codebook_where_its_checkpoint_stands(tmp_path):
    cfg = config(tmp_path / "one", quantizer="vq_ema")
    whole = train(cfg)
    assert whole["codebook"]["quantizer"]["averages"]["weight"] == pytest.approx(1 - 0.99**4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    again = train(config(tmp_path / "two", quantizer="vq_ema"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_images_in_colour_and_of_two_sides_become_tokens(tmp_path, monkeypatch):
    random, path = np.random.default_rng(0), tmp_path / "x.npz"
    np.savez(path, x=random.integers(0, 256, (60, 8, 12, 3), np.uint8), y=np.zeros(60, int))
    monkeypatch.setattr(vqvae_report, "_ROUNDS", 2)
    cfg = config(tmp_path / "run", data=f"npz:{path}")
    assert vqvae.main(cfg) == 0
    assert vq.load(tmp_path / "run" / "tokenizer").size == (8, 12, 3)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bits_per_image"] == 2 * 3 * np.log2(12)


def test_settings_that_cannot_be_are_named(tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        config(tmp_path, batch=0)
    with pytest.raises(ValueError, match="5×5 do not divide"):
        train(config(tmp_path, patch=5, architecture="vit"))
