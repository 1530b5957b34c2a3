"""Recipes of rotary positions: what they keep, what they slow, what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import rotary
from jaxformer.ops.rope import GridRope, Rope

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


GRID = (3, 4)
NEIGHBOURS = GridRope(10_000.0, 1.0, interleaved=True)


def test_on_a_grid_products_know_only_offsets_and_both_axes():
    rope = GridRope(7.0, 2.5)
    random = np.random.default_rng(0)
    at = jnp.asarray(random.standard_normal((1, 5, 2)), jnp.float32)
    moved = at + jnp.asarray([[[1.5, -2.25]]])
    one, other = (
        jnp.einsum("btnh,bsnh->bnts", rope(X, x), rope(X[:, ::-1], x)) for x in (at, moved)
    )
    np.testing.assert_allclose(one, other, atol=1e-4)
    for axis in range(2):
        assert np.abs(rope(X, at.at[..., axis].add(0.5)) - rope(X, at)).max() > 0.1


def test_each_axis_turns_a_quarter_of_the_pairs_at_its_own_speeds():
    at = jnp.asarray([[[0.3, -0.7]] * 5])
    found = np.asarray(GridRope(9.0, 2.0)(X, at))
    x = np.asarray(X)
    for pair in range(4):
        angle = 2.0 * at[0, 0, pair // 2] / 9.0 ** ((pair % 2) / 2)
        left, right = x[..., pair], x[..., pair + 4]
        turned = left * np.cos(angle) - right * np.sin(angle)
        np.testing.assert_allclose(found[..., pair], turned, atol=1e-5)
        turned = right * np.cos(angle) + left * np.sin(angle)
        np.testing.assert_allclose(found[..., pair + 4], turned, atol=1e-5)


def test_neighbours_turn_by_two_angles_and_what_is_left_over_stays():
    x = np.random.default_rng(0).standard_normal((1, 2, 1, 14)).astype(np.float32)
    at = np.array([[[1, 2, 3], [4, 0, 5]]], np.float32)
    found = np.asarray(NEIGHBOURS(jnp.asarray(x), jnp.asarray(at)))
    expected = x.copy()  # three shares of 4 channels, two frequencies each
    for token, axis in np.ndindex(2, 3):
        speeds = np.tile(1 / 10_000 ** (np.arange(2) / 2), 2)
        for n in range(4):
            angle, here = at[0, token, axis] * speeds[n], 4 * axis + n
            partner = x[0, token, 0, here + 1] * -1 if n % 2 == 0 else x[0, token, 0, here - 1]
            mine = x[0, token, 0, here]
            expected[0, token, 0, here] = mine * np.cos(angle) + partner * np.sin(angle)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rope", [GridRope(), NEIGHBOURS])
def test_a_token_at_the_origin_is_not_turned(rope):
    np.testing.assert_array_equal(rope(X, jnp.zeros((1, 5, 2))), X)


def test_coordinates_are_centres_between_the_edges_or_numbers():
    centres = GridRope().coordinates(GRID)
    assert centres.dtype == np.float32
    expected = [[-2 / 3, -0.75], [-2 / 3, -0.25], [-2 / 3, 0.25], [-2 / 3, 0.75], [0, -0.75]]
    np.testing.assert_allclose(centres[:5], expected, atol=1e-6)
    assert NEIGHBOURS.coordinates(GRID)[5:7].tolist() == [[1, 1], [1, 2]]


def test_a_head_that_does_not_fit_the_axes_is_named():
    with pytest.raises(ValueError, match="H=8, A=3"):
        GridRope()(X, jnp.zeros((1, 5, 3)))
    with pytest.raises(ValueError, match="theta"):
        GridRope(0.0)
