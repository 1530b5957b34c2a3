"""Blocked attention is dense attention with the causal mask, and refuses to be anything else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import blocked

CASES = {case.name: case for case in testing.attention_cases()}
HONOURED = {"causal", "grouped", "bfloat16"}
ODD = testing.AttentionCase(
    "odd", lambda c: attention.causal(), 2, 7, 7, num_heads=6, num_kv_heads=3, value_dim=11
)


def agrees_with_dense(case, attend):
    """Compares values and gradients towards q, k and v, compiled once."""
    inputs = case.inputs()
    qkv = [inputs.pop(name) for name in "qkv"]
    shape = (*qkv[0].shape[:3], case.value_dim)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), case.dtype)

    @jax.jit
    def both(*qkv):
        results = []
        for f in (attend, attention.attend):
            y, pull_back = jax.vjp(functools.partial(f, **inputs), *qkv)
            results.append((y, *pull_back(cotangent)))
        return results

    found, expected = both(*qkv)
    unit = 8 * float(jnp.finfo(case.dtype).eps)
    for one, other in zip(found, expected):
        assert one.dtype == case.dtype
        largest = np.abs(np.float64(other)).max()
        np.testing.assert_allclose(np.float64(one), np.float64(other), atol=unit * largest)


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_dense_attention_or_is_refused(name):
    if name in HONOURED:
        agrees_with_dense(CASES[name], blocked.attend_causal)
    else:
        with pytest.raises(NotImplementedError):
            blocked.attend_causal(**CASES[name].inputs())


@pytest.mark.parametrize(("length", "num_blocks"), [(7, 3), (2, 11)])
def test_lengths_need_be_no_multiple_of_the_blocks(length, num_blocks):
    case = dataclasses.replace(ODD, query_length=length, key_length=length)
    agrees_with_dense(case, functools.partial(blocked.attend_causal, num_blocks=num_blocks))


def test_a_scale_may_be_learned():
    inputs = ODD.inputs() | {"scale": None}

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(scale, attend):
        return jnp.square(attend(**inputs | {"scale": scale})).sum()

    found, expected = (
        gradient(jnp.array(0.3), f) for f in (blocked.attend_causal, attention.attend)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_no_query_sees_its_future():
    def mix(z):
        z = z.reshape(1, 4, 1, 3)
        return blocked.attend_causal(z, jnp.sin(z), jnp.cos(z), attention.causal())[0]

    testing.assert_causal(mix, jax.random.normal(jax.random.key(0), (4, 3)))


def test_large_logits_stay_finite():
    x = ODD.inputs()
    attend = jax.jit(blocked.attend_causal)
    y = attend(1e4 * x["q"], 1e4 * x["k"], x["v"], x["mask"])
    assert np.abs(y).max() <= np.abs(x["v"]).max()


def test_blocks_save_the_work_on_keys_that_none_of_them_sees():
    case = testing.AttentionCase("", lambda c: attention.causal(), 1, 16, 16, 1, 1, 32, 32)
    x = case.inputs()

    def work(num_blocks):
        f = jax.jit(functools.partial(blocked.attend_causal, num_blocks=num_blocks))
        return f.lower(x["q"], x["k"], x["v"], x["mask"]).compile().cost_analysis()["flops"]

    assert work(2) / work(1) == pytest.approx(3 / 4, abs=0.03)


def test_a_traced_offset_is_refused():
    x = ODD.inputs()

    @jax.jit
    def attend(offset):
        return blocked.attend_causal(x["q"], x["k"], x["v"], attention.causal(offset))

    with pytest.raises(NotImplementedError, match="causal"):
        attend(jnp.array(0))


def test_keys_of_other_positions_are_refused():
    x = ODD.inputs()
    with pytest.raises(NotImplementedError, match="T=5, S=7"):
        blocked.attend_causal(x["q"][:, :5], x["k"], x["v"], x["mask"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 5}, "N=6 is not a multiple of K=5"),
        ({"query_length": 0, "key_length": 0}, "T=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named_in_the_error(change, message):
    x = {n: dataclasses.replace(ODD, **change).inputs()[n] for n in ("q", "k", "v", "mask")}
    with pytest.raises(ValueError, match=message):
        blocked.attend_causal(**x)


def test_no_blocks_at_all_are_refused():
    x = ODD.inputs()
    with pytest.raises(ValueError, match="num_blocks=0"):
        blocked.attend_causal(x["q"], x["k"], x["v"], x["mask"], num_blocks=0)
