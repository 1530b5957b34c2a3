"""Both forms of the product are the same product, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import linear

RANDOM = np.random.default_rng(0)
WIDER, NARROWER = (5, 7), (11, 7)


def arrays(leading, sizes):
    """Input, kernel and a gradient of the output."""
    shapes = ((*leading, sizes[0]), sizes, (*leading, sizes[1]))
    return [jnp.asarray(RANDOM.standard_normal(shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(f, x, kernel, cotangent):
    y, pull_back = jax.vjp(f, x, kernel)
    return y, *pull_back(cotangent.astype(y.dtype))


@pytest.mark.parametrize("f", [linear.project, linear.project_input_first])
@pytest.mark.parametrize("leading", [(), (2, 3)])
@pytest.mark.parametrize("sizes", [WIDER, NARROWER])
def test_values_and_gradients_are_those_of_the_formula(f, leading, sizes):
    x, kernel, cotangent = arrays(leading, sizes)
    y, for_x, for_kernel = values_and_gradients(f, x, kernel, cotangent)
    x, kernel, cotangent = (np.float64(a) for a in (x, kernel, cotangent))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-5)
    np.testing.assert_allclose(for_x, cotangent @ kernel.T, atol=1e-5)
    expected = np.einsum(
        "ri,ro->io",
        np.atleast_2d(x).reshape(-1, sizes[0]),
        np.atleast_2d(cotangent).reshape(-1, sizes[1]),
    )
    np.testing.assert_allclose(for_kernel, expected, atol=1e-5)


@pytest.mark.parametrize("f", [linear.project, linear.project_input_first])
def test_gradients_have_the_dtypes_of_what_they_are_for(f):
    x, kernel, cotangent = arrays((3,), WIDER)
    narrow = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y, *gradients = jax.eval_shape(functools.partial(values_and_gradients, f), *narrow, cotangent)
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    mixed = functools.partial(values_and_gradients, f), narrow[0], kernel, cotangent
    assert [a.dtype for a in jax.eval_shape(*mixed)] == [jnp.float32, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("sizes", [WIDER, NARROWER])
def test_the_wide_side_never_comes_first_in_the_kernels_gradient(sizes):
    x, kernel, cotangent = arrays((3,), sizes)
    program = jax.make_jaxpr(lambda k: jax.vjp(linear.project_input_first, x, k)[1](cotangent)[1])
    (product,) = (
        equation.outvars[0].aval.shape
        for equation in program(kernel).eqns
        if equation.primitive.name == "dot_general" and 3 not in equation.outvars[0].aval.shape
    )
    assert product == tuple(sorted(sizes))
