"""Normalisation layers hand their parameters to the ops; BatchNorm keeps statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers import norms as layers
from jaxformer.ops import norms

X = jax.random.normal(jax.random.key(0), (3, 5, 14)) * 3 + 1


@pytest.mark.parametrize(
    ("layer", "op"),
    [
        (layers.RMSNorm(epsilon=0.1), lambda x, p: norms.rms_norm(x, **p, epsilon=0.1)),
        (layers.LayerNorm(epsilon=0.1), lambda x, p: norms.layer_norm(x, **p, epsilon=0.1)),
        (layers.LayerNorm(use_bias=False), lambda x, p: norms.layer_norm(x, p["scale"])),
        (layers.GroupNorm(7, 0.1), lambda x, p: norms.group_norm(x, 7, **p, epsilon=0.1)),
    ],
)
def test_each_layer_is_its_op_with_its_parameters(draw, layer, op):
    variables = draw(layer, X)
    assert (layer.apply(variables, X) == op(X, variables["params"])).all()
    narrow = jax.eval_shape(layer.apply, variables, X.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("layer", [layers.RMSNorm(), layers.LayerNorm(), layers.GroupNorm(7)])
def test_scales_are_one_and_shifts_zero_at_first(layer):
    for name, leaf in layer.init(jax.random.key(0), X)["params"].items():
        assert (leaf == {"scale": 1, "bias": 0}[name]).all()


def test_batch_norm_follows_the_statistics_in_training_only():
    layer = layers.BatchNorm(momentum=0.75)
    variables = layer.init(jax.random.key(0), X, train=True)
    assert not variables["batch_stats"]["mean"].any()  # initialisation counts as no step
    assert (variables["batch_stats"]["variance"] == 1).all()

    y, updated = layer.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1)), 1, atol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], X.mean((0, 1)) / 4, rtol=1e-5)
    variance = 0.75 + np.var(X, (0, 1), ddof=1) / 4
    np.testing.assert_allclose(updated["batch_stats"]["variance"], variance, rtol=1e-5)

    later = {"params": variables["params"], **updated}
    one, same = layer.apply(later, X[:1], mutable=["batch_stats"])
    assert (one == layer.apply(later, X)[:1]).all()  # no example sees the others
    assert jax.tree.all(jax.tree.map(np.array_equal, same, updated))


def test_batch_norm_shares_statistics_over_a_mapped_axis():
    layer, variables = (
        layers.BatchNorm(axis_name="devices"),
        layers.BatchNorm().init(jax.random.key(0), X),
    )

    def one(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])

    apart, updated = jax.vmap(one, axis_name="devices")(X)
    together, expected = layers.BatchNorm().apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(apart, together, atol=1e-5)
    np.testing.assert_allclose(
        updated["batch_stats"]["mean"][1], expected["batch_stats"]["mean"], rtol=1e-5
    )


def test_groups_that_do_not_divide_the_channels_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"D=14 .* num_groups=3"):
        layers.GroupNorm(3).init(jax.random.key(0), X)
