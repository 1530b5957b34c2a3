"""Kernels on the accelerator that is at hand, against dense attention; nothing to do on a CPU.

JAX_PLATFORMS=cuda python -m pytest tests/ops/attention/test_on_device.py -n 12
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import decode, flash, linear

if jax.default_backend() == "cpu":
    pytest.skip("needs an accelerator", allow_module_level=True)

pytestmark = pytest.mark.device


def wide_cases():
    """Head sizes and lengths at which kernels take every one of their block sizes."""
    causal, segments = (lambda c: attention.causal()), testing._segments_cross
    case = functools.partial(testing.AttentionCase, batch=2, num_heads=4, num_kv_heads=2)
    lengths = {"query_length": 641, "key_length": 641}
    sizes = [(64, 64), (80, 80), (128, 128), (192, 128), (128, 256), (256, 256)]
    found = [
        case(f"heads_{h}_{hv}_{name}", mask, head_dim=h, value_dim=hv, **lengths)
        for h, hv in sizes
        for name, mask in (("all", None), ("causal", causal), ("segments", segments))
    ]
    capped = {"softcap": 2.0, "bias": "1NTS", "sinks": True, "head_dim": 128, "value_dim": 128}
    found.append(case("heads_128_everything", causal, **lengths, **capped))
    long = {"query_length": 4096, "key_length": 4096, "head_dim": 128, "value_dim": 128}
    return [*found, case("long", causal, **long)]


CASES = [
    *testing.attention_cases(),
    *testing.attention_length_cases(),
    *wide_cases(),
    *map(testing.draw_attention_case, range(40)),
]


@pytest.mark.parametrize("name", flash._BY_PLATFORM.get(flash.platform(), ()))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_results_and_gradients_agree_with_dense(name, case):
    if case.dtype == jnp.float32 and name == "gpu":
        case = dataclasses.replace(case, dtype=jnp.bfloat16)
    given = case.inputs()
    try:
        flash.choose(**given, implementation=name)
    except NotImplementedError as error:
        pytest.skip(str(error))
    with jax.default_matmul_precision("highest"):
        attend = functools.partial(flash.attend, implementation=name)
        # The kernels round weights, slopes and the result that the gradients start from, each once,
        # where dense attention rounds weights alone: by √3 more.
        testing.assert_attention(
            case,
            attend,
            forward_mode=name == "xla" and case.batch == 3,
            slack=1.25 if name == "xla" else 1.75,
        )


@pytest.mark.parametrize("name", flash._BY_PLATFORM.get(flash.platform(), ()))
def test_the_same_bits_each_time(name):
    case = wide_cases()[7]
    given = case.inputs() | {"mask": attention.causal()}
    q, k, v = (given[x].astype(jnp.bfloat16) for x in "qkv")

    @jax.jit
    def everything(q, k, v):
        attend = functools.partial(flash.attend, mask=given["mask"], implementation=name)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(out)

    first = everything(q, k, v)
    for _ in range(20):
        for one, other in zip(everything(q, k, v), first, strict=True):
            np.testing.assert_array_equal(one.view(jnp.uint16), other.view(jnp.uint16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_linear_attention_agrees_with_its_chunked_form(head_dim, dtype):
    random = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(random.standard_normal((2, 1500, heads, head_dim)), dtype)
        for heads in (4, 2, 2, 4)
    )
    name = {"gpu": "gpu", "tpu": "tpu"}[flash.platform()]

    def pulled(implementation):
        def f(q, k, v):
            return linear.attend(q, k, v, implementation=implementation)

        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(d_out)

    for one, other in zip(jax.jit(pulled, static_argnums=0)(name), pulled("chunked"), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        bound = 2e-5 if dtype == jnp.float32 else 2**-6  # the result and one more rounding
        assert np.abs(one - other).max() <= bound * np.abs(other).max()


def test_decoding_agrees_with_dense():
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((3, 1, 8, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(random.standard_normal((3, 5000, 2, 128)), jnp.bfloat16) for _ in "kv")
    lengths = jnp.array([1, 777, 5000])
    found = jax.jit(decode.attend)(q, k, v, lengths)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        expected = attention.attend(*wide, attention.key_lengths(lengths))
    error = np.abs(np.asarray(found, np.float32) - np.asarray(expected))
    assert error.max() <= 2**-7 * np.abs(np.asarray(expected)).max()
