"""The TPU kernels, interpreted, agree with dense attention; so do their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops.attention import _flash_tpu, dense

CASES = {case.name: case for case in testing.attention_cases()}
MANY_BLOCKS = _flash_tpu.Cut(8, 4, 4, 4, 2)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_dense_attention_forward_and_backward(name):
    case = CASES[name]
    options = case.inputs()
    q, k, v, mask, bias, sinks = (options.pop(x) for x in ("q", "k", "v", "mask", "bias", "sinks"))
    options["scale"] = options["scale"] or q.shape[3] ** -0.5
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    wide_bias = None if bias is None else bias.astype(jnp.float32)
    expected, pull = jax.vjp(
        lambda q, k, v: dense.attend(q, k, v, mask, bias=wide_bias, sinks=sinks, **options), *wide
    )
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape), q.dtype)

    def both(q, k, v, mask, d_out, bias, sinks):
        extra = options | {"bias": bias, "sinks": sinks}
        extra |= {"interpret": True, "block_sizes": MANY_BLOCKS}
        out, lse = _flash_tpu.forward(q, k, v, mask, **extra)
        saved = (out, lse, d_out, jnp.zeros_like(lse))
        return out, *_flash_tpu.backward(q, k, v, mask, *saved, bias_gradient=False, **extra)[:3]

    found = jax.jit(both)(q, k, v, mask, d_out, bias, sinks)
    roundings = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7, jnp.float16: 2**-10}
    bound = roundings[case.dtype]
    for x, y in zip(found, (expected, *pull(d_out.astype(jnp.float32)))):
        error = np.abs(np.asarray(x, np.float32) - np.asarray(y)).max()
        assert error <= bound * max(np.abs(y).max(), 1.0)
