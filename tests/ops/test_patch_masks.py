"""Hidden patches are evenly drawn, and what is gathered goes back exactly, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import patch_masks

B, P, D, S = 3, 7, 5, 4
X = jnp.arange(1.0, 1 + B * P * D).reshape(B, P, D)
FILL = -jnp.arange(1.0, 1 + D)
# The second image shows two patches, the third none: P and beyond stand for no patch.
INDICES = jnp.array([[0, 2, 3, 6], [1, 5, P, P], [P, P + 1, 100, P]])


def test_every_patch_is_either_shown_or_hidden():
    split = patch_masks.hide(jax.random.key(0), 64, 19)
    assert split.shown.shape == (64, 4)  # of 4.75
    both = jnp.concatenate([split.shown, split.hidden], axis=1)
    np.testing.assert_array_equal(jnp.sort(both, axis=1), np.tile(np.arange(19), (64, 1)))
    assert (jnp.diff(split.shown, axis=1) > 0).all()
    assert (jnp.diff(split.hidden, axis=1) > 0).all()
    rows = np.arange(64)[:, None]
    assert split.mask.sum() == 64 * 15
    assert split.mask[rows, split.hidden].all()
    assert len({tuple(row.tolist()) for row in split.shown}) > 60  # each image by itself


def test_patches_are_hidden_each_as_often_and_pairs_as_independent_of_place():
    mask = np.asarray(patch_masks.hide(jax.random.key(1), 20_000, 12).mask, float)
    assert np.abs(mask.mean(axis=0) - 0.75).max() < 0.015  # five standard deviations
    together = mask.T @ mask / len(mask)
    apart = together[~np.eye(12, dtype=bool)]
    assert np.abs(apart - 9 / 12 * 8 / 11).max() < 0.018


@pytest.mark.parametrize(("rate", "shown"), [(0.0, 10), (0.9, 1), (0.7, 3), (0.65, 3)])
def test_the_share_that_is_shown_is_rounded_down_as_a_decimal_is(rate, shown):
    split = jax.eval_shape(lambda key: patch_masks.hide(key, 2, 10, rate=rate), jax.random.key(0))
    assert split.shown.shape == (2, shown)
    assert split.hidden.shape == (2, 10 - shown)


def test_images_are_restored_exactly_both_ways():
    split = patch_masks.hide(jax.random.key(2), B, P, rate=0.5)
    shown, hidden = (patch_masks.gather_patches(X, i) for i in (split.shown, split.hidden))
    behind = jnp.concatenate([shown, hidden], axis=1)
    np.testing.assert_array_equal(patch_masks.gather_patches(behind, split.order), X)
    filled = patch_masks.scatter_patches(shown, split.shown, FILL, P)
    np.testing.assert_array_equal(filled, jnp.where(split.mask[..., None], FILL[None, None], X))


def test_what_names_no_patch_is_gathered_as_nothing_and_scattered_nowhere():
    found = np.asarray(patch_masks.gather_patches(X, INDICES))
    filled = np.asarray(patch_masks.scatter_patches(jnp.asarray(found), INDICES, FILL, P))
    for image in range(B):
        for slot, index in enumerate(INDICES[image].tolist()):
            expected = X[image, index] if index < P else np.zeros(D)
            np.testing.assert_array_equal(found[image, slot], expected)
        for patch in range(P):
            expected = X[image, patch] if patch in INDICES[image] else FILL
            np.testing.assert_array_equal(filled[image, patch], expected)


def test_patches_of_any_dtype_and_shape_are_gathered():
    numbers = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    assert patch_masks.gather_patches(numbers, INDICES).tolist()[:2] == [[0, 2, 3, 6], [1, 5, 0, 0]]
    grids = jnp.ones((B, P, 2, 3), jnp.bfloat16)
    found = patch_masks.gather_patches(grids, INDICES)
    assert found.shape == (B, S, 2, 3)
    assert found.dtype == jnp.bfloat16
    shown = jnp.ones((B, S, D), jnp.bfloat16)
    assert patch_masks.scatter_patches(shown, INDICES, FILL, P).dtype == jnp.bfloat16


def test_gradients_go_where_the_patches_went_and_to_the_fill():
    weights = jax.random.normal(jax.random.key(3), (B, S, D))
    slope = jax.grad(lambda x: (patch_masks.gather_patches(x, INDICES) * weights).sum())(X)
    expected = patch_masks.scatter_patches(weights, INDICES, jnp.zeros(D), P)
    np.testing.assert_array_equal(slope, expected)

    weights = jax.random.normal(jax.random.key(4), (B, P, D))

    def loss(shown, fill):
        return (patch_masks.scatter_patches(shown, INDICES, fill, P) * weights).sum()

    slope, of_fill = jax.grad(loss, argnums=(0, 1))(jnp.ones((B, S, D)), FILL)
    np.testing.assert_array_equal(slope, patch_masks.gather_patches(weights, INDICES))
    empty = np.ones((B, P), bool)
    for image in range(B):
        empty[image, [i for i in INDICES[image].tolist() if i < P]] = False
    np.testing.assert_allclose(of_fill, np.asarray(weights)[empty].sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize(("rate", "shown"), [(1.0, 0), (0.95, 0), (-0.5, 10), (1.5, -3)])
def test_a_rate_that_shows_nothing_is_refused(rate, shown):
    with pytest.raises(ValueError, match=f"hide shows {shown} of P=7 patches at rate={rate}"):
        patch_masks.hide(jax.random.key(0), B, P, rate=rate)
