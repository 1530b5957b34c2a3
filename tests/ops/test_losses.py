"""Cross-entropy against its formula and PyTorch, gradients too, and what bad labels do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import losses

special = pytest.importorskip("scipy.special")

RANDOM = np.random.default_rng(0)
B, T, V = 3, 5, 7
LOGITS = RANDOM.standard_normal((B, T, V)) * 3
LABELS = RANDOM.integers(0, V, (B, T))
X, Y = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
LOSS = jax.jit(losses.cross_entropy, static_argnames=("label_smoothing", "z_loss"))


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.1)])
def test_cross_entropy_and_its_gradient_are_the_formula(smoothing, z):
    target = (1 - smoothing) * np.eye(V)[LABELS] + smoothing / V
    normaliser = special.logsumexp(LOGITS, axis=-1)
    expected = normaliser - (target * LOGITS).sum(-1) + z * normaliser**2
    slope = (1 + 2 * z * normaliser[..., None]) * special.softmax(LOGITS, -1) - target

    found, pull_back = jax.vjp(lambda x: LOSS(x, Y, label_smoothing=smoothing, z_loss=z), X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull_back(jnp.ones((B, T)))[0], slope, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_agrees_with_pytorch_and_its_gradients(smoothing):
    torch = pytest.importorskip("torch")
    logits = torch.tensor(LOGITS, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        logits.movedim(-1, 1), torch.tensor(LABELS), label_smoothing=smoothing
    )
    expected.backward()
    found, gradient = jax.value_and_grad(
        lambda x: LOSS(x, Y, label_smoothing=smoothing).mean(),
    )(X)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient, logits.grad, atol=1e-6)


def test_probabilities_sum_to_one():
    every = jnp.broadcast_to(jnp.arange(V)[:, None, None], (V, B, T))
    total = np.exp(-LOSS(jnp.broadcast_to(X, (V, B, T, V)), every)).sum(axis=0)
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_adding_a_constant_to_the_logits_changes_nothing():
    np.testing.assert_allclose(LOSS(X + 3, Y), LOSS(X, Y), atol=1e-5)


@pytest.mark.parametrize("label", [-1, -100, V, 10**6])
def test_labels_out_of_range_give_nan_there_and_only_there(label):
    bad = Y.at[1, 2].set(label)
    loss, pull_back = jax.vjp(lambda x: LOSS(x, bad), X)
    gradient = pull_back(jnp.ones((B, T)))[0]
    there = np.zeros((B, T), bool)
    there[1, 2] = True
    assert (np.isnan(loss) == there).all()
    assert (np.isnan(gradient).any(-1) == there).all()


def test_hidden_positions_are_zero_whatever_they_hold():
    where = jnp.arange(T)[None] < jnp.array([0, 3, 5])[:, None]
    labels = jnp.where(where, Y, -100)
    logits = jnp.where(where[..., None], X, jnp.nan)
    loss, pull_back = jax.vjp(
        lambda x: LOSS(x, labels, where=where, label_smoothing=0.1, z_loss=0.1), logits
    )
    (gradient,) = pull_back(jnp.ones((B, T)))
    expected = LOSS(X, Y, label_smoothing=0.1, z_loss=0.1)
    assert (np.asarray(loss) == np.where(where, expected, 0)).all()
    assert (gradient[~where] == 0).all()
    assert (np.abs(gradient[where]).sum(-1) > 0).all()


def test_large_logits_stay_finite():
    assert (LOSS(jnp.array([[0.0, 1e30]]), jnp.array([1])) == 0).all()
    assert LOSS(jnp.array([[0.0, -1e30]]), jnp.array([1])).tolist() == [np.float32(1e30)]
    assert (LOSS(jnp.array([[0.0, -jnp.inf]]), jnp.array([0])) == 0).all()


def test_narrow_logits_are_summed_wide():
    logits = jnp.zeros((1, 1000), jnp.bfloat16)
    loss = LOSS(logits, jnp.array([3]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(1000), rtol=1e-6)


def test_masked_mean_averages_what_counts():
    x = jnp.array([1.0, 2.0, jnp.nan, 6.0], jnp.bfloat16)
    where = jnp.array([True, True, False, True])
    mean, gradient = jax.value_and_grad(losses.masked_mean)(x, where)
    assert mean.dtype == jnp.float32
    assert mean == 3
    np.testing.assert_allclose(np.float32(gradient), [1 / 3, 1 / 3, 0, 1 / 3], rtol=2**-8)
    assert losses.masked_mean(x, jnp.zeros(4, bool)) == 0
    assert losses.masked_mean(x[:2]) == 1.5
    assert losses.masked_mean(x[:0]) == 0


def test_disagreements_are_named_in_the_error(untyped):
    with pytest.raises(ValueError, match=r"labels have shape \(3, 4\)"):
        losses.cross_entropy(X, Y[:, :4])
    with pytest.raises(ValueError, match="where have shape"):
        losses.cross_entropy(X, Y, where=jnp.ones((B, 1), bool))
    with pytest.raises(ValueError, match=r"1\.5"):
        losses.cross_entropy(X, Y, label_smoothing=1.5)
