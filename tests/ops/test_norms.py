"""Norms: what they leave unchanged, and PyTorch's and NumPy's numbers and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import norms

RANDOM = np.random.default_rng(0)
B, T, D = 3, 5, 14
X = RANDOM.standard_normal((B, T, D)) * 3 + 1
SCALE, BIAS = RANDOM.standard_normal((2, D))
COTANGENT = jnp.asarray(RANDOM.standard_normal((B, T, D)), jnp.float32)
MEAN, VARIANCE = RANDOM.standard_normal(D), RANDOM.random(D) + 0.5


def narrow(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@functools.cache
def jitted(name):
    """The norm compiled together with its gradient towards input, scale and bias."""

    def norm(x, scale, bias, mean, variance):
        running = {"batch_norm", "batch_norm_inference"}
        before = (mean, variance) if name in running else (7,) if name == "group_norm" else ()
        y = getattr(norms, name)(x, *before, scale, bias)
        return y if name == "batch_norm" else (y, ())

    def both(x, scale, bias, mean, variance, cotangent):
        y, pull_back, statistics = jax.vjp(
            lambda *a: norm(*a, mean, variance), x, scale, bias, has_aux=True
        )
        return y, pull_back(cotangent), statistics

    return jax.jit(both)


def theirs(torch, name, x, scale, bias, mean, variance):
    functional = torch.nn.functional
    first = x.movedim(-1, 1)
    if name == "layer_norm":
        return functional.layer_norm(x, (D,), scale, bias)
    if name == "rms_norm":
        return functional.rms_norm(x, (D,), scale, eps=1e-6) + bias
    if name == "group_norm":
        return functional.group_norm(first, 7, scale, bias).movedim(1, -1)
    training = name == "batch_norm"
    y = functional.batch_norm(first, mean, variance, scale, bias, training, momentum=0.01)
    return y.movedim(1, -1)


NAMES = ["layer_norm", "rms_norm", "group_norm", "batch_norm", "batch_norm_inference"]


@pytest.mark.parametrize("name", NAMES)
def test_norms_agree_with_pytorch_in_values_gradients_and_statistics(name):
    torch = pytest.importorskip("torch")
    x, scale, bias, mean, variance = (
        torch.tensor(a, requires_grad=a.ndim > 1 or a is SCALE or a is BIAS)
        for a in (X, SCALE, BIAS, MEAN, VARIANCE)
    )
    expected = theirs(torch, name, x, scale, bias, mean, variance)
    expected.backward(torch.tensor(np.float64(COTANGENT)))

    y, gradients, statistics = jitted(name)(*narrow(X, SCALE, BIAS, MEAN, VARIANCE), COTANGENT)
    np.testing.assert_allclose(y, expected.detach(), atol=1e-5)
    for found, other in zip(gradients, (x, scale, bias)):
        np.testing.assert_allclose(found, other.grad, atol=2e-5)
    for found, other in zip(statistics, (mean, variance)):
        np.testing.assert_allclose(found, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "axes"),
    [
        (norms.layer_norm, -1),
        (lambda x: norms.group_norm(x, 1), (1, 2)),
        (lambda x: norms.batch_norm(x, jnp.zeros(D), jnp.ones(D))[0], (0, 1)),
    ],
)
def test_what_is_normed_has_mean_zero_and_variance_one(norm, axes):
    (x,) = narrow(X)
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(axes), 1, atol=1e-4)
    testing.assert_equivariant(norm, x, lambda x: 4 * x - 2, lambda y: y, atol=1e-4)


def test_rms_norm_ignores_scale_and_heeds_shifts():
    (x,) = narrow(X)
    y = norms.rms_norm(x)
    np.testing.assert_allclose(np.square(y).mean(-1), 1, atol=1e-5)
    np.testing.assert_allclose(norms.rms_norm(-3 * x), -y, atol=1e-6)
    assert np.abs(norms.rms_norm(x + 1) - y).max() > 0.1


def test_groups_do_not_see_each_other():
    (x,) = narrow(X)
    moved = norms.group_norm(x.at[..., :2].add(5 * COTANGENT[..., :2]), 7)
    y = norms.group_norm(x, 7)
    assert np.abs(moved - y)[..., :2].max() > 0.1
    assert (moved == y)[..., 2:].all()


def test_inference_is_training_with_the_followed_statistics():
    x, zeros, ones = narrow(X, np.zeros(D), np.ones(D))
    y, (mean, variance) = norms.batch_norm(x, zeros, ones, momentum=0.0)
    biased = variance * (B * T - 1) / (B * T)
    np.testing.assert_allclose(norms.batch_norm_inference(x, mean, biased), y, atol=1e-5)
    gradient = jax.grad(lambda x: sum(s.sum() for s in norms.batch_norm(x, zeros, ones)[1]))(x)
    assert (gradient == 0).all()


def test_mapped_devices_share_their_statistics():
    x, zeros, ones = narrow(X, np.zeros(D), np.ones(D))
    together, followed = norms.batch_norm(x, zeros, ones)
    mapped, statistics = jax.vmap(
        lambda x: norms.batch_norm(x, zeros, ones, axis_name="devices"), axis_name="devices"
    )(x)
    np.testing.assert_allclose(mapped, together, atol=1e-5)
    for one, other in zip(statistics, followed):
        np.testing.assert_allclose(one, np.broadcast_to(other, (B, D)), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_narrow_inputs_are_wide(name):
    # With mean 100, bfloat16 statistics would have no correct digit of the variance left.
    x = jnp.asarray(X + 100, jnp.bfloat16)
    rest = narrow(SCALE, BIAS, MEAN, VARIANCE)
    y, gradients, statistics = jitted(name)(x, *rest, COTANGENT.astype(jnp.bfloat16))
    expected, _, _ = jitted(name)(x.astype(jnp.float32), *rest, COTANGENT)
    assert y.dtype == gradients[0].dtype == jnp.bfloat16
    assert {s.dtype for s in (*gradients[1:], *statistics)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=1e-6)


def test_a_constant_input_gives_the_bias_and_finite_gradients():
    constant, (bias,) = jnp.full((B, T, D), 3.0), narrow(BIAS)
    for norm in (norms.layer_norm, lambda x, **k: norms.group_norm(x, 7, **k)):
        # The mean is off by one rounding of 3, which 1 / sqrt(epsilon) makes 316 times larger.
        np.testing.assert_allclose(norm(constant, bias=bias)[0, 0], bias, atol=2e-4)
        gradient = jax.grad(lambda x, f=norm: (f(x) * COTANGENT).sum())(constant)
        assert np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(lambda x: norms.rms_norm(x).sum())(0 * constant)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norms.group_norm(x, 3), "D=14 .* num_groups=3"),
        (lambda x: norms.layer_norm(x, jnp.ones(3)), r"scale has shape \(3,\).*D=14"),
        (lambda x: norms.rms_norm(x, None, jnp.ones(3)), r"bias has shape \(3,\).*D=14"),
        (lambda x: norms.batch_norm(x[0, :1], jnp.ones(D), jnp.ones(D)), "got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named_in_the_error(untyped, call, message):
    with pytest.raises(ValueError, match=message):
        call(*narrow(X))
