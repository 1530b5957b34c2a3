"""MLPs against their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from jaxformer.layers.mlp import MLP, GatedMLP
from jaxformer.ops import activations, linear

X = jax.random.normal(jax.random.key(0), (2, 3, 5))
HIDDEN = 7


def maps(variables):
    """Both halves of an MLP as functions of NumPy arrays."""
    parameters = jax.tree.map(np.float64, variables["params"])
    return (
        lambda x, p=parameters[name]: x @ p["kernel"] + p.get("bias", 0) for name in ("up", "down")
    )


@pytest.mark.parametrize("use_bias", [False, True])
def test_an_mlp_is_two_maps_with_an_activation_between(draw, use_bias):
    mlp = MLP(HIDDEN, use_bias=use_bias)
    variables = draw(mlp, X)
    up, down = maps(variables)
    hidden = up(np.float64(X))
    assert hidden.shape[-1] == HIDDEN
    gelu = hidden * (1 + scipy.special.erf(hidden / 2**0.5)) / 2
    np.testing.assert_allclose(jax.jit(mlp.apply)(variables, X), down(gelu), atol=1e-5)


@pytest.mark.parametrize(
    ("unit", "activation"),
    [
        (activations.swiglu, lambda x: x * scipy.special.expit(x)),
        (activations.reglu, lambda x: np.maximum(x, 0)),
    ],
)
def test_the_first_channels_of_a_gated_mlp_are_the_gate(draw, unit, activation):
    mlp = GatedMLP(HIDDEN, unit, use_bias=True)
    variables = draw(mlp, X)
    up, down = maps(variables)
    gate, value = np.split(up(np.float64(X)), 2, axis=-1)
    assert gate.shape[-1] == HIDDEN
    expected = down(activation(gate) * value)
    np.testing.assert_allclose(jax.jit(mlp.apply)(variables, X), expected, atol=1e-5)


@pytest.mark.parametrize("make", [MLP, GatedMLP])
def test_both_maps_use_the_product_and_the_second_the_initializer(make):
    calls = []

    def project(x, kernel):
        calls.append(kernel.shape)
        return linear.project(x, kernel)

    mlp = make(HIDDEN, project=project, out_init=nn.initializers.zeros)
    y, _ = jax.jit(mlp.init_with_output)(jax.random.key(0), X)
    assert not y.any()
    assert len(calls) == 2


@pytest.mark.parametrize("make", [functools.partial(MLP, activation=activations.relu), GatedMLP])
def test_the_output_has_the_dtype_of_the_input(make):
    shape = jax.eval_shape(
        make(HIDDEN, use_bias=True).init_with_output, jax.random.key(0), X.astype(jnp.bfloat16)
    )
    assert shape[0].dtype == jnp.bfloat16
