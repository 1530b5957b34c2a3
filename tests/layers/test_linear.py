"""Dense is a product with its kernel, in the dtype of its input."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.layers.linear import Dense
from jaxformer.ops import linear

X = jax.random.normal(jax.random.key(0), (2, 3, 5))


def test_the_output_is_the_product_and_the_bias(draw):
    dense = Dense(7, use_bias=True)
    variables = draw(dense, X)
    kernel, bias = (np.float64(variables["params"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(dense.apply(variables, X), np.float64(X) @ kernel + bias, atol=1e-5)


def test_a_bias_is_zero_at_first_and_absent_unless_asked_for():
    assert set(Dense(7).init(jax.random.key(0), X)["params"]) == {"kernel"}
    bias = Dense(7, use_bias=True).init(jax.random.key(0), X)["params"]["bias"]
    assert not bias.any()


def test_parameters_are_float32_and_the_output_has_the_dtype_of_the_input():
    y, variables = jax.eval_shape(
        Dense(7, use_bias=True).init_with_output, jax.random.key(0), X.astype(jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_the_product_and_the_initializer_are_the_ones_passed_in():
    ones = nn.initializers.ones
    doubled = Dense(7, kernel_init=ones, project=lambda x, kernel: 2 * linear.project(x, kernel))
    y, _ = doubled.init_with_output(jax.random.key(0), X)
    np.testing.assert_allclose(y[..., 6], 2 * X.sum(-1), atol=1e-5)
