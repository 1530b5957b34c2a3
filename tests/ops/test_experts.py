"""Experts: routes by their definitions, the mixture by a loop, the balance at its extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import experts

R, E, D = 7, 6, 3
LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((R, E)), jnp.float32)


def test_softmax_over_the_chosen_is_the_softmax_of_all_normalised():
    weights, chosen = experts.route_softmax(LOGITS, 2)
    for row, (w, c) in enumerate(zip(weights, chosen)):
        best = np.argsort(-np.asarray(LOGITS[row]))[:2]
        np.testing.assert_array_equal(c, best)
        p = np.asarray(jax.nn.softmax(LOGITS[row]))[best]
        np.testing.assert_allclose(w, p / p.sum(), rtol=1e-6)


def test_sigmoid_routes_stay_in_the_best_groups_and_weigh_without_the_correction():
    correction = jnp.arange(E, dtype=jnp.float32)[::-1]
    weights, chosen = experts.route_sigmoid(
        LOGITS, 2, correction, groups=3, top_groups=1, factor=2.5
    )
    scores = np.asarray(jax.nn.sigmoid(LOGITS))
    ranked = scores + np.asarray(correction)
    for row in range(R):
        group = int(ranked[row].reshape(3, 2).sum(1).argmax())
        assert {*chosen[row].tolist()} == {2 * group, 2 * group + 1}
        p = scores[row, np.asarray(chosen[row])]
        np.testing.assert_allclose(weights[row], 2.5 * p / p.sum(), rtol=1e-6)
    free, _ = experts.route_sigmoid(LOGITS, 2, 0 * correction, normalize=False)
    np.testing.assert_allclose(free, -np.sort(-scores, axis=1)[:, :2], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_the_mixture_is_a_loop_over_rows_gradients_too(count):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((R, D)), jnp.float32)
    kernels = jnp.asarray(random.standard_normal((E, D, 4)), jnp.float32)

    def mixed(x, kernels, logits):
        weights, chosen = experts.route_softmax(logits, count)
        return experts.mix(
            x, weights, chosen, E, lambda rows, sizes, _: jax.lax.ragged_dot(rows, kernels, sizes)
        )

    def looped(x, kernels, logits):
        weights, chosen = experts.route_softmax(logits, count)
        return jnp.einsum("rc,rd,rcdf->rf", weights, x, kernels[chosen])

    one, pull = jax.vjp(mixed, x, kernels, LOGITS)
    other, pull_other = jax.vjp(looped, x, kernels, LOGITS)
    np.testing.assert_allclose(one, other, atol=1e-5)
    upstream = jnp.asarray(random.standard_normal(one.shape), jnp.float32)
    for a, b in zip(pull(upstream), pull_other(upstream), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_even_use_balances_and_one_for_all_does_not():
    even = 20.0 * jnp.eye(E)
    np.testing.assert_allclose(experts.load_balance(even, 1), 1.0, rtol=1e-5)
    same = jnp.broadcast_to(even[:1], (R, E))
    np.testing.assert_allclose(experts.load_balance(same, 1), E, rtol=1e-5)
    assert np.abs(jax.grad(experts.load_balance)(LOGITS, 2)).max() > 0


def test_the_balance_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    expected = mixtral.load_balancing_loss_func((torch.tensor(np.asarray(LOGITS)),), E, 2)
    np.testing.assert_allclose(experts.load_balance(LOGITS, 2), float(expected), rtol=1e-6)
