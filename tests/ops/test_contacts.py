"""Corrected maps are symmetric, sum to nothing, and are what the formula says."""

import jax.numpy as jnp
import numpy as np

from jaxformer.ops import contacts

X = np.random.default_rng(0).random((2, 3, 5, 5)).astype("float32")


def test_maps_become_symmetric():
    y = np.asarray(contacts.symmetrize(jnp.asarray(X)))
    np.testing.assert_array_equal(y, y.swapaxes(-1, -2))
    np.testing.assert_array_equal(np.diagonal(y, axis1=-2, axis2=-1), 2 * X.diagonal(0, -2, -1))


def test_the_correction_takes_away_what_rows_and_columns_explain():
    y = np.asarray(contacts.average_product_correction(jnp.asarray(X)))
    for x, found in zip(X.reshape(-1, 5, 5).astype(float), y.reshape(-1, 5, 5)):
        np.testing.assert_allclose(found, x - np.outer(x.sum(1), x.sum(0)) / x.sum(), atol=1e-6)
    np.testing.assert_allclose(y.sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.sum(-2), 0, atol=1e-5)
    product = np.outer(np.arange(1.0, 6), np.arange(2.0, 7)).astype("float32")
    np.testing.assert_allclose(
        contacts.average_product_correction(jnp.asarray(product)), 0, atol=1e-5
    )


def test_an_empty_map_stays_empty():
    assert not np.asarray(contacts.average_product_correction(jnp.zeros((1, 4, 4)))).any()
