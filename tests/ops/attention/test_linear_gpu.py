"""The GPU kernels of linear attention, interpreted, are its chunked form; and they lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxformer.ops.attention import linear
from jaxformer.ops.attention.linear import State

EPS = {jnp.float32: 2.0**-23, jnp.bfloat16: 2.0**-8}
RANDOM = linear.positive_random_features(jax.random.key(0), 16, 20)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels on CPU."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def draw(batch, length, heads, kv_heads, head_dim, value_dim, dtype, feature_map):
    """q, k, v, a state of the size of their own, and cotangents of all results."""
    random = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q = normal(batch, length, heads, head_dim, dtype=dtype)
    k = normal(batch, length, kv_heads, head_dim, dtype=dtype)
    v = normal(batch, length, kv_heads, value_dim, dtype=dtype)
    features = linear._pair(feature_map).keys(k.astype(jnp.float32))
    unit, shape = features.mean(), (batch, kv_heads, features.shape[-1])
    state = State(normal(*shape, value_dim) * unit, length * unit * jnp.abs(normal(*shape)))
    after = State(normal(*shape, value_dim), normal(*shape))
    after = jax.tree.map(lambda x: x / unit / length, after)
    return (q, k, v, state), (normal(*q.shape[:3], value_dim, dtype=dtype), after)


def everything(implementation, feature_map, arguments, cotangents, lengths):
    """Values, state, and the gradients of both."""

    def f(q, k, v, state):
        return linear.attend(
            q,
            k,
            v,
            feature_map=feature_map,
            key_lengths=lengths,
            state=state,
            return_state=True,
            implementation=implementation,
            chunk=16,
        )

    def both(arguments, cotangents):
        y, pull_back = jax.vjp(f, *arguments)
        return y, pull_back(cotangents)

    return jax.jit(both)(arguments, cotangents)


CASES = {
    "grouped": ((2, 300, 6, 2, 16, 32, jnp.float32, linear.elu_plus_one), [300, 77]),
    "narrow": ((1, 140, 2, 2, 32, 16, jnp.bfloat16, linear.elu_plus_one), None),
    "odd": ((1, 13, 3, 3, 7, 5, jnp.float32, linear.relu), None),
    "features": ((1, 257, 2, 1, 16, 16, jnp.float32, RANDOM), [201]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_interpreted_agree_with_the_chunked_form(name, interpreted):
    sizes, lengths = CASES[name]
    dtype, feature_map = sizes[-2:]
    lengths = None if lengths is None else jnp.array(lengths)
    arguments, cotangents = draw(*sizes)
    found = everything("gpu", feature_map, arguments, cotangents, lengths)
    expected = everything("chunked", feature_map, arguments, cotangents, lengths)
    assert found[0][0].dtype == dtype
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert one.dtype == other.dtype
        largest = np.abs(np.float64(other)).max()
        np.testing.assert_allclose(
            np.float64(one), np.float64(other), atol=64 * EPS[dtype] * largest
        )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowering needs a described device")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_and_backward_lower_for_a_gpu_that_is_not_there(dtype):
    def loss(q, k, v):
        return linear.attend(q, k, v, implementation="gpu").astype(jnp.float32).sum()

    x = [jax.ShapeDtypeStruct((1, 1000, heads, 128), dtype) for heads in (4, 2, 2)]
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("linear_sums") >= 2
    for name in ("linear_forward", "linear_backward_queries", "linear_backward_keys"):
        assert name in text


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chunk", "message"),
    [
        (jnp.float32, 16, 24, "chunk=24"),
        (jnp.float32, 300, None, "F=300"),
        (jnp.float64, 16, None, "float64"),
    ],
)
def test_what_the_kernel_cannot_honour_it_refuses(dtype, head_dim, chunk, message):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.ones((1, 7, 2, head_dim), dtype)
        with pytest.raises(NotImplementedError, match=message):
            linear.attend(x, x, x, implementation="gpu", chunk=chunk)
