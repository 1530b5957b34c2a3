"""The token world model in small: its sequences, its rollouts, and what a run leaves."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import ball, frame_tokens, token_world
from experiments import token_world_report as report
from experiments.frame_tokens import TokenizerConfig
from experiments.token_world import Config
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.models.vqvae import ViTCoder

TINY = Config(
    box=ball.Box(side=16),
    tokenizer=TokenizerConfig(levels=(3, 2), coder=ViTCoder(8, 1, 2, 8), steps=3, batch=4),
    model=TransformerConfig(1, 8, 1, 2, 2, 4, 8),
    context=2,
    ahead=3,
    flights=12,
    steps=3,
    batch=4,
    warmup=1,
    mesh="data=1",
)
CODES = 6


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Leaves this process's cache and memory as they are."""
    monkeypatch.setattr(report, "TESTS", 7)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "TESTS", 7)
        assert token_world.main(dataclasses.replace(TINY, run=str(folder))) == 0
    return folder


def test_a_sequence_is_frame_action_frame_action():
    ids = np.array([[[0, 1], [2, 3], [4, 5]]])
    row = frame_tokens.to_sequence(ids, np.array([[0, 4, 2]]), CODES)
    np.testing.assert_array_equal(row, [[0, 1, 6, 2, 3, 10, 4, 5, 8]])


@pytest.fixture(scope="module")
def told(draw):
    """A decoder with strong opinions, what it saw, what was done, and what it told."""
    vocab_size = CODES + len(ball.PUSHES)
    model = Decoder(dataclasses.replace(TINY.model, vocab_size=vocab_size))
    params = draw(model, jnp.zeros((1, 2), int))
    rng = np.random.default_rng(0)
    seen = frame_tokens.to_sequence(
        rng.integers(0, CODES, (5, 2, 3)), rng.integers(0, 5, (5, 2)), CODES
    )[:, :-1]
    actions = rng.integers(0, 5, (5, 4))
    ids = report.roll_out(model, params, jnp.asarray(seen), jnp.asarray(actions), 3)
    return model, params, seen, actions, np.asarray(ids)


def test_a_rollout_tells_the_likeliest_token_of_a_frame_given_all_before_it(told):
    model, params, seen, actions, ids = told
    assert ids.shape == (5, 4, 3)
    moments = np.concatenate([CODES + actions[..., None], ids], axis=-1).reshape(5, -1)
    whole = np.concatenate([seen, moments], axis=1)
    logits = model.apply(params, jnp.asarray(whole))
    best = np.asarray(logits[..., :CODES].argmax(-1))[:, seen.shape[1] - 1 : -1]
    want = best.reshape(5, 4, 4)[..., 1:]
    np.testing.assert_array_equal(ids, want)
    assert len(np.unique(ids)) > 2


def test_an_action_changes_what_follows_it_and_nothing_before(told):
    model, params, seen, actions, ids = told
    changed = False
    for action in range(5):
        other = actions.copy()
        other[:, 2] = action
        again = report.roll_out(model, params, jnp.asarray(seen), jnp.asarray(other), 3)
        np.testing.assert_array_equal(again[:, :2], ids[:, :2])
        changed |= bool((again[:, 2:] != ids[:, 2:]).any())
    assert changed


def test_a_run_leaves_report_pictures_and_a_tokenizer(finished):
    figures = json.loads((finished / "report.json").read_text())
    assert figures["vocabulary"] == CODES
    assert figures["tokens_of_a_frame"] == 4
    for name in ("predicted", "repeated", "other_pushes", "tokenizer"):
        assert len(figures[f"mse_{name}_by_horizon"]) == 3
        assert figures[f"mse_{name}"] == pytest.approx(np.mean(figures[f"mse_{name}_by_horizon"]))
    share = figures["mse_predicted"] / figures["mse_repeated"]
    assert figures["share_of_repeated"] == pytest.approx(share)
    for name in ("error", "rollouts", "loss"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "tokenizer" / "metrics.jsonl").exists()


def test_the_repeated_frame_is_the_last_one_seen(finished):
    figures = json.loads((finished / "report.json").read_text())
    _, test = jax.random.split(jax.random.key(TINY.seed))
    frames = token_world.flights(TINY, test, 7).frames
    want = np.square(frames[:, 2:] - frames[:, 1:2]).mean(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(figures["mse_repeated_by_horizon"], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--tokenizer.patch", "6"], "do not divide"),
        (["--box.side", "5"], "side=5"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)
