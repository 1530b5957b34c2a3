"""What keeps representations apart, beside PyTorch written from the papers; and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import spreading

B, T, D = 3, 5, 7
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)) * 0.8, jnp.float32)
TERMS = [spreading.koleo, spreading.variance_term, spreading.covariance_term]


def koleo_of_the_paper(torch, x):
    x = x / x.norm(dim=1, keepdim=True)
    distances = [min((x[i] - x[j]).norm() for j in range(len(x)) if j != i) for i in range(len(x))]
    return -torch.stack([torch.log(distance) for distance in distances]).mean()


def variance_of_the_paper(torch, x):
    return torch.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()


def covariance_of_the_paper(torch, x):
    square = torch.cov(x.T) ** 2
    return (square.sum() - square.diagonal().sum()) / x.shape[1]


PAPERS = [koleo_of_the_paper, variance_of_the_paper, covariance_of_the_paper]


@pytest.mark.parametrize(("term", "paper"), [*zip(TERMS, PAPERS)])
def test_terms_and_gradients_are_the_papers(term, paper):
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(X), dtype=torch.float64, requires_grad=True)
    expected = paper(torch, x.flatten(0, 1))
    expected.backward()
    found, slope = jax.jit(jax.value_and_grad(term))(X)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(slope, x.grad, atol=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_the_order_of_the_vectors_is_of_no_account(term):
    np.testing.assert_allclose(term(X[::-1]), term(X), rtol=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_equal_vectors_and_vectors_of_nothing_have_finite_gradients(term):
    for x in (jnp.ones((4, D)), jnp.zeros((4, D))):
        value, slope = jax.value_and_grad(term)(x)
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope).all()


def test_white_vectors_have_no_terms_and_repeated_channels_do():
    white = np.linalg.qr(np.random.default_rng(1).standard_normal((64, D)))[0]
    white = jnp.asarray(np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(63) * 1.01)
    assert spreading.variance_term(white) == 0
    np.testing.assert_allclose(spreading.covariance_term(white), 0, atol=1e-6)
    twins = jnp.repeat(white[:, :1], 3, axis=1)
    np.testing.assert_allclose(spreading.covariance_term(twins), 6 * 1.01**4 / 3, rtol=1e-4)
    np.testing.assert_allclose(spreading.variance_term(twins, target=1.5), 0.49, rtol=1e-3)


def test_nearer_vectors_cost_more():
    assert spreading.koleo(X) < spreading.koleo(X * 0.1 + 1)


@pytest.mark.parametrize("term", TERMS)
def test_a_single_vector_has_none_to_keep_apart_from(term):
    with pytest.raises(ValueError, match="B=1"):
        term(X[:1, 0])


@pytest.mark.parametrize("term", TERMS)
def test_narrow_vectors_are_computed_wide(term):
    x = jnp.asarray(X, jnp.bfloat16)
    assert term(x).dtype == jnp.float32
    np.testing.assert_array_equal(term(x), term(x.astype(jnp.float32)))
