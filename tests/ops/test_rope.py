"""Recipes of rotary positions: what they keep, what they slow, what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import rotary
from jaxformer.ops.rope import Rope

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 8)), jnp.float32)
PLACES = jnp.arange(5)


def test_the_plain_recipe_is_rotate():
    np.testing.assert_allclose(Rope(100.0)(X, PLACES), rotary.rotate(X, PLACES, 100.0), atol=1e-6)


def test_a_share_of_the_channels_turns_and_the_rest_stays():
    found = Rope(100.0, fraction=0.5)(X, PLACES)
    np.testing.assert_allclose(found[..., :4], rotary.rotate(X[..., :4], PLACES, 100.0), atol=1e-6)
    np.testing.assert_array_equal(found[..., 4:], X[..., 4:])


def test_linear_stretching_reads_a_longer_text_as_the_shorter():
    long = Rope(100.0, kind="linear", factor=4.0)
    np.testing.assert_allclose(long(X, 4 * PLACES), Rope(100.0)(X, PLACES), atol=1e-5)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_what_turns_often_stays_and_what_hardly_turns_is_slowed(kind):
    given = {"theta": 1e6, "factor": 8.0, "length": 64, "fast": 4.0, "slow": 1.0}
    kept = Rope(kind=kind, **given).frequencies(64) / Rope(1e6).frequencies(64)
    assert kept[0] == 1
    np.testing.assert_allclose(kept[-1], 1 / 8, rtol=1e-6)
    assert (np.diff(kept) <= 1e-6).all()


def test_yarn_scales_by_the_logarithm_of_the_factor():
    rope = Rope(kind="yarn", factor=4.0, length=16)
    turned = rope(X, 0 * PLACES)  # at place 0 nothing turns
    np.testing.assert_allclose(turned, X * (0.1 * np.log(4.0) + 1), rtol=1e-6)


def test_dynamic_stretching_begins_beyond_the_length_trained_on():
    rope = Rope(kind="dynamic", factor=2.0, length=5)
    np.testing.assert_allclose(rope(X, PLACES), Rope()(X, PLACES), atol=1e-6)
    slowed = rope.frequencies(8, jnp.array([19])) / Rope().frequencies(8)
    assert slowed[0] == 1
    assert (np.diff(slowed) < 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "long"}, "'long'"),
        ({"theta": 0.0}, "theta"),
        ({"factor": -1.0}, "factor"),
        ({"fraction": 0.0}, "fraction"),
        ({"kind": "yarn"}, "length"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Rope(**given)
