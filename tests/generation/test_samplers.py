"""Filters keep exactly the tokens they should; samplers draw what is left with its probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import samplers

V = 13
LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, V))
FILTERS = {
    "temper": (samplers.temper, [0.3, 1.0, 2.5]),
    "top_k": (samplers.keep_top_k, [1, 4, V, V + 7]),
    "top_p": (samplers.keep_top_p, [1e-9, 0.3, 0.9, 0.9999, 1.0]),
    "min_p": (samplers.keep_min_p, [0.0, 0.05, 0.5, 1.0]),
}


def kept(logits):
    return np.isfinite(np.asarray(logits, np.float32))


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_filters_keep_the_best_and_leave_what_they_keep_untouched(name):
    keep, values = FILTERS[name]
    for value in values:
        out = keep(LOGITS, value)
        stays = kept(out)
        assert stays[np.arange(5), LOGITS.argmax(-1)].all(), value
        worst_kept = np.where(stays, LOGITS, np.inf).min(-1, keepdims=True)
        assert (np.where(stays, -np.inf, LOGITS) < worst_kept).all(), value
        np.testing.assert_array_equal(np.asarray(out)[stays], np.asarray(LOGITS)[stays])


def test_top_k_keeps_k_tokens():
    for k in (1, 4, V):
        assert (kept(samplers.keep_top_k(LOGITS, k)).sum(-1) == k).all()
    np.testing.assert_array_equal(samplers.keep_top_k(LOGITS, V + 7), LOGITS)


def test_top_p_keeps_the_smallest_sufficient_set():
    probabilities = jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]])
    for p, count in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        stays = kept(samplers.keep_top_p(jnp.log(probabilities), p))
        np.testing.assert_array_equal(stays[0], np.arange(4) < count)
        np.testing.assert_array_equal(stays[1], stays[0][::-1])


def test_top_p_of_one_keeps_even_what_float32_cannot_sum():
    logits = jnp.asarray([[0.0, -60.0, -300.0]])
    np.testing.assert_array_equal(samplers.keep_top_p(logits, 1.0), logits)


def test_top_p_near_one_sums_from_the_unlikely_end():
    logits = jnp.log(jnp.asarray([[1.0] + [1e-9] * 64]))  # 64e-9 of tail, each lost beside 1
    assert kept(samplers.keep_top_p(logits, 1 - 3.2e-9)).all()


def test_min_p_compares_with_the_best_probability():
    logits = jnp.log(jnp.asarray([[0.6, 0.31, 0.059, 0.031]]))
    np.testing.assert_array_equal(kept(samplers.keep_min_p(logits, 0.1)), [[1, 1, 0, 0]])
    np.testing.assert_array_equal(kept(samplers.keep_min_p(logits, 0.05)), [[1, 1, 1, 1]])


def test_equal_logits_stay_or_go_together():
    logits = jnp.asarray([[1.0, 2.0, 2.0, 0.0, 2.0]])
    top = [[0, 1, 1, 0, 1]]
    np.testing.assert_array_equal(kept(samplers.keep_top_k(logits, 1)), top)
    np.testing.assert_array_equal(kept(samplers.keep_top_p(logits, 0.1)), top)
    np.testing.assert_array_equal(kept(samplers.keep_min_p(logits, 1.0)), top)


def test_tokens_at_minus_infinity_stay_out():
    logits = LOGITS.at[:, ::2].set(-jnp.inf)
    for keep, values in FILTERS.values():
        for value in values:
            out = np.asarray(keep(logits, value))
            assert (out[:, ::2] == -np.inf).all(), (keep, value)
            assert not np.isnan(out).any(), (keep, value)


def test_the_penalty_takes_from_seen_tokens_alone_whatever_their_sign():
    logits = jnp.asarray([[2.0, -2.0, 0.0, 3.0, -3.0, -jnp.inf]])
    seen = jnp.asarray([[True, True, True, False, False, True]])
    for dtype in (jnp.float32, jnp.bfloat16):
        out = samplers.penalize_repetition(logits.astype(dtype), seen, 2.0)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, [[1, -4, 0, 3, -3, -np.inf]])


def test_seen_are_the_tokens_inside_the_lengths_and_the_vocabulary():
    tokens = jnp.asarray([[0, 3, 3, 1], [9, -1, 4, 2], [2, 2, 2, 2]])
    seen = samplers.seen_tokens(tokens, jnp.asarray([3, 4, 0]), 5)
    np.testing.assert_array_equal(seen, [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [0] * 5])


def test_filters_commute_with_a_permutation_of_the_vocabulary():
    order = jax.random.permutation(jax.random.key(1), V)
    for keep, values in FILTERS.values():
        for value in values:
            np.testing.assert_array_equal(
                keep(LOGITS[:, order], value), keep(LOGITS, value)[:, order]
            )


def test_filters_keep_bfloat16_and_decide_as_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    for keep, values in FILTERS.values():
        for value in values:
            out = keep(logits, value)
            assert out.dtype == jnp.bfloat16
            np.testing.assert_array_equal(kept(out), kept(keep(logits.astype(jnp.float32), value)))


def test_bad_values_are_named_in_the_error():
    for build, match in (
        ({"temperature": 0.0}, r"got 0.0; 0 is the sampler greedy"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_k": 0}, "k=0"),
        ({"top_p": 0.0}, "p=0.0"),
        ({"top_p": 1.5}, "p=1.5"),
        ({"min_p": -0.1}, "p=-0.1"),
        ({"min_p": 1.1}, "p=1.1"),
        ({"repetition_penalty": 0.0}, "penalty=0.0"),
        ({"repetition_penalty": -1.2}, "penalty=-1.2"),
    ):
        with pytest.raises(ValueError, match=match):
            samplers.sampler(**build)
    with pytest.raises(ValueError, match=r"penalty=0\.0"):
        samplers.greedy(repetition_penalty=0.0)
    for sample in (
        samplers.sampler(repetition_penalty=2.0),
        samplers.greedy(repetition_penalty=2.0),
    ):
        with pytest.raises(ValueError, match="`seen`"):
            sample(jax.random.key(0), LOGITS)


def test_filters_agree_with_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    theirs = {
        "temper": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    scores = torch.tensor(np.asarray(LOGITS))
    for name, (keep, values) in FILTERS.items():
        for value in values:
            expected = theirs[name](value)(None, scores).numpy()
            np.testing.assert_allclose(keep(LOGITS, value), expected, rtol=1e-6, err_msg=name)
    tokens = np.random.default_rng(0).integers(0, V, (5, 4))
    seen = samplers.seen_tokens(jnp.asarray(tokens), jnp.full(5, 4), V)
    for penalty in (0.7, 1.0, 1.8):
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(tokens), scores)
        ours = samplers.penalize_repetition(LOGITS, seen, penalty)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    scores = process.RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor(tokens), scores)
    for name, value in (("temper", 0.7), ("top_k", 6), ("top_p", 0.8), ("min_p", 0.3)):
        scores = theirs[name](value)(None, scores)
    numbers = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.3}
    ours = samplers.sampler(repetition_penalty=1.8, **numbers).filtered(LOGITS, seen)
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)


def test_the_order_of_the_filters_matters_and_temperature_is_first():
    logits = jnp.log(jnp.asarray([[0.6, 0.3, 0.1]]))
    hot = samplers.sampler(temperature=100.0, top_p=0.6).filtered(logits)
    np.testing.assert_array_equal(kept(hot), [[1, 1, 0]])  # nearly uniform before top-p
    narrow = samplers.sampler(top_k=2, top_p=0.65).filtered(logits)  # 0.6 becomes 0.67 of two
    np.testing.assert_array_equal(kept(narrow), [[1, 0, 0]])


@pytest.mark.parametrize("top_k", [None, 3])
def test_frequencies_of_the_draws_follow_the_filtered_distribution(top_k):
    sample = samplers.sampler(temperature=2.0, top_k=top_k)
    draws = 20_000
    logits = jnp.broadcast_to(LOGITS[:1], (draws, V))
    tokens = jax.jit(sample)(jax.random.key(2), logits)
    expected = np.asarray(jax.nn.softmax(sample.filtered(LOGITS[:1])))[0]
    seen = np.bincount(tokens, minlength=V) / draws
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(seen - expected) <= 4.5 * deviation).all()  # zero where the filter said so


def test_greedy_takes_the_best_and_of_equals_the_first():
    sample = samplers.greedy()
    tokens = sample(jax.random.key(0), LOGITS.at[0].set(1.0))
    np.testing.assert_array_equal(tokens, [0, *np.asarray(LOGITS[1:].argmax(-1))])
    kept_alone = kept(sample.filtered(LOGITS.at[0].set(1.0)))
    np.testing.assert_array_equal(kept_alone, np.eye(V)[tokens])


def test_equal_settings_are_equal_so_that_jit_traces_once():
    assert samplers.sampler(top_k=3) == samplers.sampler(top_k=3)
    assert hash(samplers.sampler(top_k=3)) == hash(samplers.sampler(top_k=3))
    assert samplers.sampler(top_k=3) != samplers.sampler(top_k=4)
    assert samplers.greedy() == samplers.greedy()
    assert hash(samplers.greedy()) == hash(samplers.greedy())
    assert samplers.greedy() != samplers.greedy(repetition_penalty=2.0)
