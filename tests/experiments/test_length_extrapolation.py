"""Longer texts predict the same tokens, rotations stretch, and a few steps end in a report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import length_extrapolation, texts
from experiments.length_extrapolation import Config
from jaxformer.models.transformer import TransformerConfig
from jaxformer.training import mesh

MODEL = TransformerConfig(1, 8, 1, 2, 2, 4, 11, num_buckets=4)
TINY = Config(model=MODEL, context=4, times=(1, 3), tokens=10, steps=2, batch=3)


@pytest.fixture(scope="module")
def text():
    return texts.load(["embedded"])


def drawn(cfg, kind, text):
    model = length_extrapolation.model_of(cfg, kind, text.tokenizer.vocab_size)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), int))


def test_learned_positions_beyond_the_table_are_its_last(text):
    _, params = drawn(TINY, "learned", text)
    table = params["params"]["places"]["table"]
    found = length_extrapolation.lengthened(params, 7)["params"]["places"]["table"]
    assert table.shape == (4, 8)
    np.testing.assert_array_equal(found, table[np.array([0, 1, 2, 3, 3, 3, 3])])
    _, others = drawn(TINY, "rotary", text)
    assert length_extrapolation.lengthened(others, 7) is others


def test_rotations_are_those_trained_with_until_the_text_is_longer():
    rotations = length_extrapolation.ropes("rotary")
    places, longer = jnp.arange(16), jnp.arange(64)
    plain = rotations["RoPE"](16, 1.0).frequencies(8, places)
    assert list(rotations) == ["RoPE", "RoPE, linear", "RoPE, NTK", "RoPE, YaRN"]
    for name, stretch in rotations.items():
        np.testing.assert_allclose(stretch(16, 1.0).frequencies(8, places), plain, rtol=1e-6)
        slower = stretch(16, 4.0).frequencies(8, longer) / plain
        assert ((slower < 0.999).any()) == (name != "RoPE")
        assert slower.min() > 0.2499
    np.testing.assert_allclose(rotations["RoPE, linear"](16, 4.0).frequencies(8), plain / 4)


def test_every_length_predicts_the_same_tokens(text):
    """A model that looks at the last token alone is no better for more of them."""
    cfg = dataclasses.replace(TINY, model=dataclasses.replace(MODEL, windows=(1,)))
    _, params = drawn(cfg, "rotary", text)
    (stretch,) = length_extrapolation.ropes("none").values()
    found = length_extrapolation.read(cfg, "rotary", stretch, params, text, mesh.make("data=1"))
    assert found[1] == pytest.approx(found[3], rel=1e-5)
    wider = dataclasses.replace(cfg, model=MODEL)
    found = length_extrapolation.read(wider, "rotary", stretch, params, text, mesh.make("data=1"))
    assert found[1] != pytest.approx(found[3], rel=1e-5)


def test_a_run_reports_every_reading_and_draws_the_picture(tmp_path, capsys):
    cfg = dataclasses.replace(TINY, run=str(tmp_path), positions=("learned", "rotary", "buckets"))
    length_extrapolation.main(cfg)
    report = json.loads((tmp_path / "report.json").read_text())
    rotations = ["RoPE", "RoPE, linear", "RoPE, NTK", "RoPE, YaRN"]
    assert list(report["nats"]) == ["learned, the last one again", *rotations, "T5 bias"]
    for nats in report["nats"].values():
        assert list(nats) == ["1", "3"]
        assert all(2 < x < 9 for x in nats.values())
    once = [report["nats"][name]["1"] for name in rotations]
    assert once == pytest.approx(once[:1] * 4, rel=1e-5)
    assert (tmp_path / "length_extrapolation.png").stat().st_size > 1000
    assert "RoPE, YaRN" in capsys.readouterr().out


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="positions must be among"):
        Config(positions=("rope",))
    with pytest.raises(ValueError, match="times"):
        Config(times=())
