"""Activations against their formulas in SciPy, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import activations

special = pytest.importorskip("scipy.special")

X = np.linspace(-6, 6, 241)
FORMULAS = {
    activations.gelu: lambda x: x * special.ndtr(x),
    activations.gelu_tanh: lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    activations.silu: lambda x: x * special.expit(x),
    activations.relu: lambda x: np.maximum(x, 0),
    activations.relu_squared: lambda x: np.maximum(x, 0) ** 2,
}
GATES = {
    activations.glu: special.expit,
    activations.geglu: FORMULAS[activations.gelu],
    activations.swiglu: FORMULAS[activations.silu],
    activations.reglu: FORMULAS[activations.relu],
    activations.bilinear: lambda x: x,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_are_their_formulas(activation):
    x = jnp.asarray(X, jnp.float32)
    formula = FORMULAS[activation]
    np.testing.assert_allclose(activation(x), formula(X), rtol=1e-5, atol=1e-6)
    # Between the kinks at multiples of 0.05, where the difference quotient has no say.
    middle = X[:-1] + 0.025
    slope = (formula(middle + 1e-6) - formula(middle - 1e-6)) / 2e-6
    found = jax.grad(lambda x: activation(x).sum())(jnp.asarray(middle, jnp.float32))
    # In the tail 1 - tanh**2 is lost to rounding, times x and x**3.
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("unit", GATES)
def test_gated_units_activate_the_gate_alone(unit):
    gate, value = X[None, :-1] + 0.025, np.cos(X[None, :-1])
    arrays = [jnp.asarray(a, jnp.float32) for a in (gate, value)]
    y, pull_back = jax.vjp(unit, *arrays)
    towards_gate, towards_value = pull_back(jnp.ones_like(y))
    slope = (GATES[unit](gate + 1e-6) - GATES[unit](gate - 1e-6)) / 2e-6
    np.testing.assert_allclose(y, GATES[unit](gate) * value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(towards_value, GATES[unit](gate), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(towards_gate, slope * value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("activation", [activations.gelu, activations.gelu_tanh, activations.silu])
def test_narrow_inputs_are_rounded_once(activation):
    x = jnp.asarray(X, jnp.bfloat16)
    found = activation(x)
    assert found.dtype == jnp.bfloat16
    assert (found == activation(x.astype(jnp.float32)).astype(jnp.bfloat16)).all()


def test_the_far_ends_stay_finite_with_finite_gradients():
    far = jnp.array([-1e4, 1e4])
    for activation in (activations.gelu, activations.gelu_tanh, activations.silu):
        values, slopes = activation(far), jax.grad(lambda x, f=activation: f(x).sum())(far)
        np.testing.assert_allclose(values, [0, 1e4], atol=1e-6)
        np.testing.assert_allclose(slopes, [0, 1], atol=1e-6)
