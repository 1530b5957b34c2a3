"""Codebooks: nearest codes, their training and use, FSQ and the relaxed categorical."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops import codebook

RANDOM = np.random.default_rng(0)
B, P, D, E = 7, 5, 3, 11
X = RANDOM.standard_normal((B, P, D)).astype(np.float32)
CODES = RANDOM.standard_normal((E, D)).astype(np.float32)
FIRST = codebook.start_averages(jnp.asarray(CODES))
LEVELS = (8, 5, 2, 3, 6)


def brute_force(x, codes):
    x, codes = np.asarray(x, np.float64), np.asarray(codes, np.float64)
    return np.square(x[..., None, :] - codes).sum(-1).argmin(-1)


# Nearest codes.


@pytest.mark.parametrize("offset", [0.0, 100.0, -3e4])
def test_the_nearest_code_is_that_of_brute_force_wherever_the_codes_lie(offset):
    x, codes = (RANDOM.standard_normal((n, 17)) for n in (499, 61))
    x, codes = (np.asarray(part + offset, np.float32) for part in (x, codes))
    found = codebook.nearest(jnp.asarray(x), jnp.asarray(codes))
    assert found.dtype == jnp.int32
    assert (found == brute_force(x, codes)).all()


def test_of_equal_codes_the_first_is_chosen_and_bfloat16_is_widened():
    codes = jnp.asarray([[1.0], [0.0], [1.0], [2.0]])
    assert codebook.nearest(jnp.asarray([[0.9], [0.5], [9.0]]), codes).tolist() == [0, 0, 3]
    x, codes = (jnp.asarray(part, jnp.bfloat16) for part in (X, CODES))
    assert (codebook.nearest(x, codes) == brute_force(x, codes)).all()


# Gradients.


def test_the_straight_through_estimator_is_exact_forwards_and_the_identity_backwards():
    x, quantized = jnp.asarray(X), jnp.asarray(1e4 + X[::-1])
    tangent, other = jnp.asarray(X[:, ::-1]), jnp.ones_like(x)
    y, pushed = jax.jvp(codebook.straight_through, (x, quantized), (tangent, other))
    assert (y == quantized).all()
    assert (pushed == tangent).all()
    _, pull = jax.vjp(codebook.straight_through, x, quantized)
    to_x, to_quantized = pull(tangent)
    assert (to_x == tangent).all()
    assert not to_quantized.any()


def test_each_loss_moves_its_own_side_only():
    x, codes = jnp.asarray(X), jnp.asarray(X[::-1])
    expected = np.square(X - X[::-1]).mean()
    for loss, moved in ((codebook.commitment_loss, 0), (codebook.codebook_loss, 1)):
        value, grads = jax.value_and_grad(loss, (0, 1))(x, codes)
        assert value == pytest.approx(expected)
        np.testing.assert_allclose(
            grads[moved], 2 * (1 - 2 * moved) * (X - X[::-1]) / X.size, rtol=1e-5, atol=1e-9
        )
        assert not grads[1 - moved].any()
    assert codebook.commitment_loss(x.astype(jnp.bfloat16), codes).dtype == jnp.float32


# Use.


def test_perplexity_counts_codes_that_are_used_alike():
    counts = codebook.usage(jnp.asarray([[0, 3, 3], [0, 5, 5]]), 7)
    assert counts.tolist() == [2, 0, 0, 2, 0, 2, 0]
    assert codebook.perplexity(counts) == pytest.approx(3, rel=1e-6)
    assert codebook.perplexity(jnp.zeros(7)) == 1
    assert codebook.usage(jnp.asarray([-1, 7, 6]), 7).tolist() == [0] * 6 + [1]
    shares = np.array([0.5, 0.3, 0.2])
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert codebook.perplexity(jnp.asarray(shares * 40)) == pytest.approx(expected, rel=1e-5)


# Codes that follow their inputs.


def haiku_steps(batches, codes, decay, epsilon=1e-5):
    """The codes after each step of VectorQuantizerEMA with zero-debiased averages, in float64."""
    counts, sums = np.zeros(len(codes)), np.zeros(codes.shape)
    for step, x in enumerate(batches, start=1):
        chosen = np.eye(len(codes))[brute_force(x, codes)]
        counts = decay * counts + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ x
        debias = 1 - decay**step
        total = counts.sum() / debias
        size = (counts / debias + epsilon) / (total + len(codes) * epsilon) * total
        codes = sums / debias / size[:, None]
        yield codes


def one_step(averages, x, decay):
    ids = codebook.nearest(x, codebook.averaged_codes(averages))
    return codebook.update_averages(averages, x, ids, decay)


step = jax.jit(one_step, static_argnums=2)


def test_the_averaged_codes_are_those_of_haiku_step_by_step():
    batches = RANDOM.standard_normal((6, 101, D)).astype(np.float32)
    averages = FIRST
    assert (codebook.averaged_codes(averages) == CODES).all()
    for x, expected in zip(batches, haiku_steps(batches, CODES, 0.9)):
        averages = step(averages, x, 0.9)
        np.testing.assert_allclose(
            codebook.averaged_codes(averages), expected, rtol=1e-4, atol=1e-5
        )
    assert averages.weight == pytest.approx(1 - 0.9**6, rel=1e-5)


def test_a_sharded_batch_is_one_batch_and_the_mean_over_parts_is_its_step_in_ratio():
    x = RANDOM.standard_normal((16, P, D)).astype(np.float32)
    start = step(FIRST, x[::-1], 0.9)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    here = jax.device_put(start, NamedSharding(mesh, PartitionSpec()))
    whole = step(start, x, 0.9)
    for one, many in zip(whole, step(here, sharded, 0.9)):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)

    first = FIRST
    parts = [step(first, part, 0.9) for part in x.reshape(2, 8, P, D)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parts)
    found, expected = map(codebook.averaged_codes, (mean, step(first, x, 0.9)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_gradient_flows_through_the_averages():
    def total(x):
        return sum(
            leaf.sum() for leaf in one_step(codebook.start_averages(jnp.asarray(CODES)), x, 0.5)
        )

    assert not jax.grad(total)(jnp.asarray(X)).any()


def test_codes_that_are_hardly_chosen_move_onto_vectors_of_the_batch():
    counts = jnp.asarray([1.0, 0.01, 0.2] + [1.0] * (E - 3)) / 2
    averages = codebook.Averages(jnp.asarray(0.5), counts, counts[:, None] * CODES)
    found = codebook.revive_averages(averages, jnp.asarray(X), jax.random.key(0), 0.1)
    codes = codebook.averaged_codes(found)
    np.testing.assert_allclose(np.delete(codes, 1, 0), np.delete(CODES, 1, 0), rtol=1e-3)
    assert np.abs(X.reshape(-1, D) - np.asarray(codes[1])).max(-1).min() < 1e-3
    assert found.counts[1] == pytest.approx(counts.mean())
    kept = codebook.revive_averages(FIRST, jnp.asarray(X), jax.random.key(0), 0.1)
    assert (kept.sums == CODES).all()  # before the first step none is dead


def test_revived_codes_are_distinct_draws_that_depend_on_the_key():
    dead = jnp.asarray([True, False] + [True] * (E - 2))
    one, other = (
        codebook.revive(jnp.asarray(CODES), dead, jnp.asarray(X), jax.random.key(i)) for i in (0, 1)
    )
    assert (one[1] == CODES[1]).all()
    rows = {tuple(row) for row in X.reshape(-1, D).tolist()}
    assert all(tuple(row) in rows for row in np.delete(one, 1, 0).tolist())
    assert len(np.unique(one, axis=0)) > E // 2
    assert (one != other).any()


# Finite scalar quantisation.


class Paper:
    """The listing of appendix A.1, written anew in NumPy and float64."""

    def __init__(self, levels, epsilon=1e-3):
        self.levels, self.basis = np.array(levels), np.cumprod([1, *levels])[:-1]
        self.reach = (self.levels - 1) * (1 - epsilon) / 2
        self.offset = 0.5 * (self.levels % 2 == 0)

    def quantize(self, z):
        shifted = np.tanh(z + np.tan(self.offset / self.reach))
        return np.round(shifted * self.reach - self.offset) / (self.levels // 2)

    def ids(self, codes):
        return ((codes * (self.levels // 2) + self.levels // 2) * self.basis).sum(-1).round()


def test_fsq_is_the_listing_of_the_paper():
    z = 3 * RANDOM.standard_normal((401, 5)).astype(np.float32)
    paper, found = Paper(LEVELS), codebook.fsq_quantize(jnp.asarray(z), LEVELS)
    expected = paper.quantize(np.float64(z))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (codebook.fsq_ids(found, LEVELS) == paper.ids(expected)).all()


def test_every_fsq_code_goes_to_its_number_and_back():
    ids = jnp.arange(math.prod(LEVELS)).reshape(2, -1)
    codes = codebook.fsq_codes(ids, LEVELS)
    assert codes.shape == (*ids.shape, 5)
    assert (codebook.fsq_ids(codes, LEVELS) == ids).all()
    assert len(np.unique(codes.reshape(-1, 5), axis=0)) == math.prod(LEVELS)
    assert codes.min() == -1
    assert codes.max() == 1


def test_all_fsq_levels_are_reached_and_no_more():
    z = jnp.broadcast_to(jnp.linspace(-20, 20, 4001)[:, None], (4001, 5))
    digits = np.asarray(codebook.fsq_quantize(z, LEVELS)) * (np.array(LEVELS) // 2)
    digits = digits.round(4)
    assert [len(np.unique(column)) for column in digits.T] == list(LEVELS)
    assert digits.min(0).tolist() == [-4, -2, -1, -1, -3]
    assert digits.max(0).tolist() == [3, 2, 0, 1, 2]


def test_fsq_rounding_lets_the_gradient_of_the_bound_through():
    z, half = jnp.asarray(RANDOM.standard_normal((13, 5)), jnp.float32), np.array(LEVELS) // 2
    _, rounded = jax.jvp(lambda z: codebook.fsq_quantize(z, LEVELS), (z,), (jnp.ones_like(z),))
    _, bounded = jax.jvp(lambda z: codebook.fsq_bound(z, LEVELS), (z,), (jnp.ones_like(z),))
    np.testing.assert_allclose(rounded, np.asarray(bounded) / half, rtol=1e-5)
    assert codebook.fsq_quantize(z.astype(jnp.bfloat16), LEVELS).dtype == jnp.bfloat16


@pytest.mark.parametrize("levels", [(3, 3), (3, 3, 1), (2**11, 2**11, 2**10)])
def test_levels_that_cannot_be_are_named(levels):
    with pytest.raises(ValueError, match=r"D=3 .* levels=\(" + str(levels[0])):
        codebook.fsq_quantize(jnp.asarray(X), levels)


# The relaxed categorical.


def test_gumbel_weights_are_a_softmax_and_one_hot_at_zero():
    logits, weights = jnp.asarray(CODES), jax.jit(codebook.gumbel_weights)
    np.testing.assert_allclose(weights(logits, 0.7), jax.nn.softmax(logits / 0.7), rtol=1e-5)
    hard = codebook.gumbel_weights(logits, 0.0)
    assert (hard == np.eye(D)[CODES.argmax(-1)]).all()
    np.testing.assert_allclose(weights(logits, 1e-4), hard, atol=1e-6)
    grad = jax.grad(lambda x, t: (codebook.gumbel_weights(x, t) * logits).sum())
    assert not grad(logits, 0.0).any()
    assert grad(logits, 0.5).any()


def test_gumbel_draws_have_the_probabilities_of_the_logits():
    shares = np.array([0.5, 0.3, 0.2])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares))[None], (40_000, 3))
    draws = codebook.gumbel_weights(logits, 0.0, jax.random.key(0))
    assert (draws.sum(-1) == 1).all()
    np.testing.assert_allclose(draws.mean(0), shares, atol=0.01)
    soft = codebook.gumbel_weights(logits, 2.0, jax.random.key(0))
    assert (soft.argmax(-1) == draws.argmax(-1)).all()
    assert soft.max() < 1


def test_the_divergence_from_the_uniform_prior_runs_from_0_to_log_E():
    logits = jnp.asarray([[0.0] * E, [90.0] + [0.0] * (E - 1), RANDOM.standard_normal(E)])
    q = np.asarray(jax.nn.softmax(logits[2]), np.float64)
    expected = [0, math.log(E), (q * np.log(q * E)).sum()]
    np.testing.assert_allclose(codebook.kl_to_uniform(logits), expected, atol=1e-6)
