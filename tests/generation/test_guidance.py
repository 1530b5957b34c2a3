"""Guidance is arithmetic of two branches, whatever loop and sampler it goes with."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxformer.generation import decode, guidance, samplers, speculative, stream

V, P, STEPS, B = 11, 3, 5, 2
KEY = jax.random.key(3)
WITH = jax.random.randint(jax.random.key(1), (B, P), 0, V)
WITHOUT = jnp.zeros((B, P), jnp.int32)
BOTH = jnp.concatenate([WITH, WITHOUT])
COMMON = jnp.asarray([[4], [7]])
ALLOWED = jnp.arange(V) >= 6


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def toy(make_toy):
    return make_toy(V)


@pytest.fixture(scope="module")
def params(toy):
    return toy.params()


@pytest.fixture(scope="module")
def write(toy):
    """Tokens and scores of a guided completion, compiled once for all scales and parameters."""

    @functools.partial(jax.jit, static_argnames="sample")
    @chex.assert_max_traces(2)
    def compiled(params, scale, allowed, sample):
        model = Partial(toy.decode, params)
        cache = guidance.branch(model, toy.empty_cache(2 * B), BOTH)
        steered = guidance.restricted(guidance.guided(model, scale), allowed)
        done = decode.complete(steered, cache, COMMON, steps=STEPS, sample=sample, key=KEY)
        return done.tokens[:, 1:], done.log_probs

    return compiled


def naive(toy, params, row, scale, allowed):
    """The greedy tokens of one row, from two whole texts for each; and their scores."""
    tokens, scores = [int(COMMON[row, 0])], []
    for _ in range(STEPS):
        one, other = (
            toy.whole(params, np.asarray([*part[row], *tokens])) for part in (WITH, WITHOUT)
        )
        logits = np.where(allowed, other + scale * (one - other), -np.inf)
        tokens.append(int(logits.argmax()))
        scores.append(np.log(softmax(logits)[tokens[-1]]))
    return tokens[1:], scores


def test_probabilities_are_the_product_of_powers():
    one, other = np.asarray(jax.random.normal(KEY, (2, 5, V)))
    found = softmax(np.asarray(guidance.guide(jnp.asarray(one), jnp.asarray(other), 3.0)))
    expected = softmax(one) ** 3 * softmax(other) ** -2
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), rtol=1e-5)


def test_scale_1_is_the_condition_and_scale_0_none():
    one, other = jax.random.normal(KEY, (2, 5, V))
    np.testing.assert_array_equal(guidance.guide(one, other, 1.0), one)
    np.testing.assert_allclose(guidance.guide(one, other, 0.0), other, atol=1e-6)


def test_what_either_branch_rules_out_stays_out():
    one = jnp.asarray([0.0, -jnp.inf, 1.0, -jnp.inf, 2.0])
    other = jnp.asarray([0.5, 1.0, -jnp.inf, -jnp.inf, 0.0])
    found = guidance.guide(one, other, 2.0)
    np.testing.assert_array_equal(found, [-0.5, -np.inf, -np.inf, -np.inf, 4.0])


def test_logits_of_16_bits_are_moved_in_32():
    one, other = jax.random.normal(KEY, (2, 5, V)).astype(jnp.bfloat16)
    found = guidance.guide(one, other, 7.3)
    assert found.dtype == jnp.bfloat16
    exact = guidance.guide(one.astype(jnp.float32), other.astype(jnp.float32), 7.3)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_only_allowed_tokens_are_kept():
    logits = jax.random.normal(KEY, (2, 3, V))
    kept = guidance.keep_only(logits, ALLOWED)
    np.testing.assert_array_equal(kept[..., 6:], logits[..., 6:])
    assert np.isneginf(kept[..., :6]).all()
    with pytest.raises(ValueError, match=r"allowed=\(10,\) tokens of a vocabulary V=11"):
        guidance.keep_only(logits, ALLOWED[1:])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("everything", [True, False])
def test_the_cached_loop_writes_what_two_whole_texts_give(write, toy, params, scale, everything):
    allowed = ALLOWED | everything
    tokens, scores = write(params, scale, allowed, sample=samplers.greedy())
    for row in range(B):
        expected, their_scores = naive(toy, params, row, scale, np.asarray(allowed))
        assert tokens[row].tolist() == expected
        np.testing.assert_allclose(scores[row], their_scores, atol=1e-4)


def test_guidance_makes_a_difference_and_draws_within_the_allowed(write, params):
    sample = samplers.sampler(temperature=3.0)
    plain, guided = (write(params, scale, ALLOWED, sample=sample)[0] for scale in (1.0, 4.0))
    assert (plain != guided).any()
    assert min(plain.min(), guided.min()) >= 6


@pytest.fixture(scope="module")
def started(toy, params):
    """A guided model, and its cache after prompts of different lengths."""
    model = Partial(toy.decode, params)
    lengths = jnp.asarray([3, 2, 1, 3])
    cache = guidance.branch(model, toy.empty_cache(2 * B), BOTH, lengths)
    return guidance.guided(model, 2.0), cache


def test_branches_have_texts_of_lengths_of_their_own(started, toy, params):
    model, cache = started
    np.testing.assert_array_equal(cache.length, [3, 2])
    assert cache.max_length == 16
    logits, cache = model(COMMON, cache)
    np.testing.assert_array_equal(cache.rows.length, [4, 3, 2, 4])
    one = toy.whole(params, np.asarray([*WITH[1, :2], 7]))
    other = toy.whole(params, np.asarray([*WITHOUT[1, :3], 7]))
    np.testing.assert_allclose(logits[1, 0], other + 2 * (one - other), atol=1e-3)


def test_the_cache_is_selected_and_rewound_as_that_of_the_texts_alone(started):
    model, cache = started
    logits, longer = model(COMMON, cache)
    back = longer.rewind(cache.length)
    np.testing.assert_array_equal(back.rows.length, cache.rows.length)
    rows = jnp.asarray([1, 0, 1])
    again, _ = model(COMMON[rows], back.select(rows))
    np.testing.assert_allclose(again, logits[rows], atol=1e-5)


def test_counts_go_to_both_branches(started):
    model, cache = started
    _, longer = model(jnp.tile(COMMON, (1, 2)), cache, jnp.asarray([2, 1]))
    np.testing.assert_array_equal(longer.rows.length - cache.rows.length, [2, 1, 2, 1])


def test_streams_and_speculation_write_the_same(started, toy, params):
    model, cache = started
    options = {"steps": STEPS, "key": KEY, "sample": samplers.greedy()}
    expected = decode.generate(model, cache, COMMON, **options)[:, 1:]
    chunks = list(stream.stream(model, cache, COMMON, every=2, **options))
    np.testing.assert_array_equal(np.concatenate([c.tokens for c in chunks], axis=1), expected)
    draft, empty = functools.partial(toy.decode, params), toy.empty_cache(B)
    told = speculative.speculate(model, cache, draft, empty, COMMON, draft_steps=2, **options)
    np.testing.assert_array_equal(told.tokens[:, 1:], expected)


def test_an_odd_number_of_rows_is_refused(toy, params):
    with pytest.raises(ValueError, match="R=3"):
        guidance.branch(Partial(toy.decode, params), toy.empty_cache(3), BOTH[:3])
