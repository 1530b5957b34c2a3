"""Speculation writes with the target's own distribution: chi-square over whole texts."""

import collections
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxformer.generation import decode, samplers, speculative, stops
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig

V, P, STEPS, DRAWS = 6, 3, 3, 30_000
PROMPT = jnp.asarray([[1, 4, 0], [3, 0, 2]])
LENGTHS = jnp.asarray([1, 3])
PLAIN = samplers.sampler()
FILTERED = samplers.sampler(repetition_penalty=1.6, temperature=2.0, top_k=5, top_p=0.95)


@pytest.fixture(scope="module")
def toy(make_toy):
    return make_toy(V, room=P + STEPS - 1, spread=0.6)


@functools.partial(
    jax.jit, static_argnames=("toy", "batch", "steps", "draft_steps", "sample", "stop", "pad")
)
def compiled(toy, batch, params, draft_params, key, limits, **static):
    rows = jnp.arange(batch) % 2
    return speculative.speculate(
        functools.partial(toy.decode, params),
        toy.empty_cache(batch),
        functools.partial(toy.decode, draft_params),
        toy.empty_cache(batch),
        PROMPT[rows],
        key=key,
        prompt_lengths=LENGTHS[rows],
        limits=limits[rows],
        **static,
    )


def run(toy, batch=DRAWS, draft_seed=1, seed=0, limits=(99, 99), **static):
    static = {"steps": STEPS, "draft_steps": 2, "sample": PLAIN} | static
    params, draft_params = toy.params(0), toy.params(draft_seed)
    key, limits = jax.random.key(seed), jnp.asarray(limits)
    return jax.device_get(compiled(toy, batch, params, draft_params, key, limits, **static))


def exact(toy, row, sample, stop):
    """The probability of every text that the target may write after a prompt."""
    prompt = PROMPT[row, : LENGTHS[row]].tolist()
    params, known = toy.params(0), {}

    @functools.cache
    def after(text):
        logits = jnp.asarray(toy.whole(params, np.asarray(prompt + list(text))), jnp.float32)
        seen = jnp.asarray(np.isin(np.arange(V), prompt + list(text)))
        return np.asarray(jax.nn.softmax(sample.filtered(logits, seen)))

    for text in itertools.product(range(V), repeat=STEPS):
        probability, new = 1.0, ()
        for token in text:
            probability *= float(after(new)[token])
            new += (token,)
            if any(new[-len(part) :] == part for part in stops.sequences(stop)):
                break
        known[new] = probability  # the same whichever tokens follow a stop
    assert abs(sum(known.values()) - 1) < 1e-5
    return known


def p_value(toy, done, row, sample, stop=None):
    """Of the hypothesis that the texts of a prompt were drawn from the target."""
    known = exact(toy, row, sample, stop)
    start = int(LENGTHS[row])
    texts = [
        tuple(tokens[start:end].tolist())
        for tokens, end in zip(done.tokens[row::2], done.lengths[row::2])
    ]
    seen = collections.Counter(texts)
    assert not {text for text in seen if known[text] == 0}, "the filters forbid these"
    expected = {text: p * len(texts) for text, p in known.items() if p > 0}
    common = [text for text in expected if expected[text] >= 5]
    rest = sum(expected[text] for text in expected if expected[text] < 5)
    observed = [seen[text] for text in common] + [len(texts) - sum(seen[text] for text in common)]
    wanted = [expected[text] for text in common] + [rest]
    if rest < 5:
        observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    wanted = np.asarray(wanted) * (sum(observed) / sum(wanted))
    assert len(wanted) > 20
    return stats.chisquare(observed, wanted).pvalue


@pytest.mark.parametrize(
    ("sample", "stop", "draft_steps"),
    [(PLAIN, None, 2), (FILTERED, (3, (2, 2)), 3)],
    ids=["plain", "filtered, seen and stopped"],
)
def test_the_distribution_is_the_targets(toy, sample, stop, draft_steps):
    done = run(toy, sample=sample, stop=stop, draft_steps=draft_steps)
    for row in range(2):
        assert p_value(toy, done, row, sample, stop) > 1e-3
    rate = done.accepted.sum() / done.proposed.sum()
    assert 0.1 < rate < 0.9, "both outcomes of the check are tested"


VERIFY = speculative.verify


def draw(key, log_probs, accepted):
    here = jnp.take_along_axis(log_probs, accepted[:, None, None], axis=1)[:, 0]
    return jax.random.categorical(jax.random.fold_in(key, 7), here)


def accept_always(key, proposals, draft_log_probs, log_probs):
    accepted = jnp.full(len(proposals), proposals.shape[1])
    return accepted, draw(key, log_probs, accepted)


def redraw_from_the_target(key, proposals, draft_log_probs, log_probs):
    accepted, _ = VERIFY(key, proposals, draft_log_probs, log_probs)
    return accepted, draw(key, log_probs, accepted)


def redraw_from_the_draft_side(key, proposals, draft_log_probs, log_probs):
    accepted, _ = VERIFY(key, proposals, draft_log_probs, log_probs)
    p, q = jnp.exp(log_probs), jnp.pad(jnp.exp(draft_log_probs), ((0, 0), (0, 1), (0, 0)))
    rest = jnp.where(jnp.pad(q, 0).sum(-1, keepdims=True) > 0, jnp.maximum(q - p, 0), p)
    return accepted, draw(key, jnp.log(rest), accepted)


def turn_the_ratio_over(key, proposals, draft_log_probs, log_probs):
    last = log_probs[:, -1:]
    accepted, _ = VERIFY(
        key, proposals, log_probs[:, :-1], jnp.concatenate([draft_log_probs, last], axis=1)
    )
    return accepted, VERIFY(key, proposals, draft_log_probs, log_probs)[1]


BROKEN = accept_always, redraw_from_the_target, redraw_from_the_draft_side, turn_the_ratio_over


def test_a_wrong_rule_of_acceptance_is_caught(toy, monkeypatch):
    """All rules in one program: the right one passes the test that each of the others fails."""
    which = jnp.asarray(0)

    def one_of(*arguments):
        return jax.lax.switch(which, (VERIFY, *BROKEN), *arguments)

    monkeypatch.setattr(speculative, "verify", one_of)

    @jax.jit
    def write(rule):
        nonlocal which
        which = rule
        limits = jnp.asarray([99, 99])
        rest = {"steps": STEPS, "draft_steps": 2, "sample": PLAIN}
        params, draft_params, key = toy.params(0), toy.params(1), jax.random.key(0)
        return compiled.__wrapped__(toy, DRAWS, params, draft_params, key, limits, **rest)

    for rule in range(5):
        done = jax.device_get(write(jnp.asarray(rule)))
        worst = min(p_value(toy, done, row, PLAIN) for row in range(2))
        assert worst > 1e-3 if rule == 0 else worst < 1e-9, rule


def test_greedy_speculation_is_greedy_decoding(make_toy):
    toy, steps = make_toy(V, room=16), 12
    sample, limits, stop = samplers.greedy(repetition_penalty=1.5), (12, 9), ((4, 4), (2, 1))

    @jax.jit
    def write(params):
        cache, key = toy.empty_cache(2), jax.random.key(0)
        model, rest = functools.partial(toy.decode, params), {"steps": steps, "stop": stop}
        rest |= {"prompt_lengths": LENGTHS, "limits": jnp.asarray(limits), "pad": 5}
        return decode.complete(model, cache, PROMPT, sample=sample, key=key, **rest)

    plain = jax.device_get(write(toy.params(0)))
    rest = {"steps": steps, "draft_steps": 3, "limits": limits, "stop": stop, "pad": 5}
    for draft_seed in (0, 1, 2):
        done = run(toy, batch=2, draft_seed=draft_seed, sample=sample, **rest)
        np.testing.assert_array_equal(done.tokens, plain.tokens)
        np.testing.assert_array_equal(done.lengths, plain.lengths)
        np.testing.assert_array_equal(done.cache.length, done.lengths - 1)
        np.testing.assert_array_equal(done.draft_cache.length, done.lengths - 1)
        if draft_seed == 0:  # the target itself: all it says is accepted
            new = done.lengths - np.asarray(LENGTHS)
            np.testing.assert_array_equal(done.calls, 1 + -(-(new - 1) // 4))
            np.testing.assert_array_equal(done.accepted, new - 1 - (new - 1) // 4)
        else:
            assert (done.accepted < done.proposed).any()


def test_drafts_are_as_long_as_windows_can_forget(draw):
    config = TransformerConfig(V, 8, 2, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6)
    model = Decoder(dataclasses.replace(config, windows=(3, 2)))
    steps, params = 40, [draw(model, PROMPT, seed=seed) for seed in (0, 1)]
    caches = [model.empty_cache(2, P + steps) for _ in params]
    target, draft = (functools.partial(model.apply, part) for part in params)
    rest = {"steps": steps, "key": jax.random.key(0), "sample": samplers.greedy()}
    rest["prompt_lengths"] = LENGTHS

    def write(draft_steps):
        caches_of = (target, caches[0], draft, caches[1])
        return speculative.speculate(*caches_of, PROMPT, draft_steps=draft_steps, **rest)

    plain = jax.jit(lambda: decode.complete(target, caches[0], PROMPT, **rest))()
    done = jax.jit(lambda: write(15))()
    np.testing.assert_array_equal(done.tokens, plain.tokens)
    assert (done.accepted < done.proposed).all()
    with pytest.raises(ValueError, match="draft_steps=16 exceeds the 15 tokens that cache"):
        write(16)
    caches[0] = Decoder(config).empty_cache(2, 17)  # forgets all
    rest["steps"] = 2
    with pytest.raises(ValueError, match="draft_steps=16 exceeds the 15 tokens that draft_cache"):
        write(16)


def test_the_cache_goes_on_with_the_next_turn(make_toy):
    toy = make_toy(V, room=16)
    done = run(toy, batch=2, seed=3, steps=5, sample=PLAIN)
    last = np.take_along_axis(done.tokens, done.lengths[:, None] - 1, axis=1)
    for cache, seed in ((done.cache, 0), (done.draft_cache, 1)):
        cache = jax.tree.map(jnp.asarray, cache)
        logits, _ = jax.jit(toy.decode)(toy.params(seed), last, cache)
        for row in range(2):
            text = done.tokens[row, : done.lengths[row]]
            expected = toy.whole(toy.params(seed), text)
            np.testing.assert_allclose(logits[row, 0], expected, rtol=1e-3, atol=1e-3)


def test_verify_by_hand():
    p = jnp.log(jnp.asarray([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]))
    q = jnp.log(jnp.asarray([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]))
    verify = jax.jit(speculative.verify)
    for proposals, expected in (([0, 2], 2), ([2, 2], 0)):
        accepted, token = verify(jax.random.key(0), jnp.asarray([proposals]), q, p)
        assert int(accepted[0]) == expected
        assert int(token[0]) == 1 or expected == 0, "all agree: the target's last token"
    p = jnp.log(jnp.asarray([[[0.2, 0.8], [0.5, 0.5]]]))
    q = jnp.log(jnp.asarray([[[0.8, 0.2]]]))
    many = (np.zeros((8000, 1), np.int32), *(np.tile(part, (8000, 1, 1)) for part in (q, p)))
    accepted, token = jax.device_get(verify(jax.random.key(0), *many))
    assert abs(accepted.mean() - 0.25) < 0.02
    assert (token[accepted == 0] == 1).all(), "what is left of p is token 1 alone"


def test_other_lengths_limits_and_keys_compile_nothing(toy):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def write(params, lengths, limits, key):
        model = functools.partial(toy.decode, params)
        caches = toy.empty_cache(2), toy.empty_cache(2)
        return speculative.speculate(
            model,
            caches[0],
            model,
            caches[1],
            PROMPT,
            steps=STEPS,
            draft_steps=2,
            sample=PLAIN,
            key=key,
            prompt_lengths=lengths,
            limits=limits,
        )

    for seed in range(2):
        done = write(toy.params(seed), LENGTHS - seed % 1, LENGTHS + seed, jax.random.key(seed))
        np.testing.assert_array_equal(done.lengths, LENGTHS + np.minimum(LENGTHS + seed, STEPS))


def test_arguments_out_of_range_are_named_in_the_error(toy):
    for arguments, match in (
        ({"draft_steps": 0}, "draft_steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 4}, "room for 5"),
        ({"stop": ((),)}, "no tokens"),
    ):
        given = {"steps": 2, "draft_steps": 2, "sample": PLAIN, "key": jax.random.key(0)}
        model = functools.partial(toy.decode, toy.params())
        with pytest.raises(ValueError, match=match):
            speculative.speculate(
                model, toy.empty_cache(2), model, toy.empty_cache(2), PROMPT, **given | arguments
            )
