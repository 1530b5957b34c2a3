"""Residuals and blocks against their formulas; what training drops."""

import functools

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.layers.attention import CrossAttention, KVCache, SelfAttention
from jaxformer.layers.block import Block, NoNorm, PostNorm, PreNorm, SandwichNorm
from jaxformer.layers.linear import Dense
from jaxformer.layers.mlp import MLP
from jaxformer.layers.norms import LayerNorm, RMSNorm
from jaxformer.ops import attention

B, T, D = 3, 5, 8
X = jax.random.normal(jax.random.key(0), (B, T, D))
CONTEXT = jax.random.normal(jax.random.key(1), (B, 7, 11))
INNER = functools.partial(Dense, D)


def identity(**_):
    """A branch of ones, so that what was dropped can be seen."""
    return lambda x: jnp.ones_like(x)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize(
    ("residual", "formula"),
    [
        (PreNorm, lambda x, f, norm: x + f(norm("norm", x))),
        (PostNorm, lambda x, f, norm: norm("norm", x + f(x))),
        (NoNorm, lambda x, f, norm: x + f(x)),
        (SandwichNorm, lambda x, f, norm: x + norm("norm_out", f(norm("norm", x)))),
    ],
)
def test_residuals_follow_their_formulas(draw, residual, formula):
    layer = residual(INNER, scale_init=0.1)
    variables = draw(layer, X)
    p = jax.tree.map(np.float64, variables["params"])

    def inner(x):
        return x @ p["inner"]["kernel"] * p["scale"]

    expected = formula(np.float64(X), inner, lambda name, x: rms(x, p[name]["scale"]))
    np.testing.assert_allclose(layer.apply(variables, X), expected, atol=1e-5)
    assert layer.apply(variables, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_scale_starts_at_its_first_value_in_every_channel():
    scale = PreNorm(INNER, scale_init=1e-4).init(jax.random.key(0), X)["params"]["scale"]
    assert scale.tolist() == [np.float32(1e-4)] * D
    assert set(PreNorm(INNER).init(jax.random.key(0), X)["params"]) == {"inner", "norm"}


def test_the_norm_is_the_one_passed_in():
    parameters = PreNorm(INNER, norm=LayerNorm).init(jax.random.key(0), X)["params"]
    assert set(parameters["norm"]) == {"scale", "bias"}


def test_the_second_of_a_pair_passes_untouched():
    layer = PreNorm(lambda name: lambda x, state: (x, state + 1))
    y, state = layer.apply({"params": {"norm": {"scale": jnp.ones(D)}}}, X, 41)
    assert state == 42
    np.testing.assert_allclose(y, X + rms(np.float64(X), 1), atol=1e-5)


MANY = jnp.zeros((4000, 3, 2))
UNIT = {"params": {"norm": {"scale": jnp.ones(2)}}}


def dropped(layer, x=MANY, **kwargs):
    """What is added to zeros in training."""
    apply = functools.partial(layer.apply, train=True, rngs={"dropout": jax.random.key(3)})
    return np.asarray(apply(UNIT, x, **kwargs))


@pytest.mark.parametrize(("depth", "share"), [(1.0, 0.4), (0.5, 0.2), (0.0, 0.0)])
def test_drop_path_leaves_out_whole_samples_as_often_as_it_should(depth, share):
    y = dropped(PreNorm(identity, drop_path=0.4), depth=depth)
    each = y.reshape(len(MANY), -1)
    assert (each == each[:, :1]).all()
    np.testing.assert_allclose(np.unique(y)[-1], 1 / (1 - share), rtol=1e-6)
    assert len(np.unique(y)) == (2 if share else 1)
    spread = (share * (1 - share) / len(MANY)) ** 0.5
    assert abs((each[:, 0] == 0).mean() - share) <= 4 * spread


def test_dropout_drops_numbers_of_the_branch_as_often_as_it_should():
    y = dropped(PreNorm(identity, dropout=0.25))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    assert abs((y == 0).mean() - 0.25) <= 4 * (0.25 * 0.75 / y.size) ** 0.5
    assert not (y == y[:, :1, :1]).all((1, 2)).all()


def test_a_narrow_stream_stays_narrow_and_is_scaled_without_bias():
    y = dropped(PreNorm(identity, drop_path=0.1, dropout=0.1), MANY.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert set(np.unique(np.float32(y))) == {0.0, np.float32(jnp.bfloat16(1 / 0.9 / 0.9))}


def test_nothing_is_dropped_without_train_and_no_key_is_needed():
    layer = PreNorm(identity, dropout=0.5, drop_path=0.5)
    assert (layer.apply(UNIT, MANY) == 1).all()
    with pytest.raises(flax.errors.InvalidRngError):
        layer.apply(UNIT, MANY, train=True)
    assert (PreNorm(identity).apply(UNIT, MANY, train=True) == 1).all()


@pytest.mark.parametrize("drop_path", [1.0, -0.1])
def test_a_drop_path_that_is_no_probability_is_refused(drop_path):
    with pytest.raises(ValueError, match=str(drop_path)):
        PreNorm(identity, drop_path=drop_path).apply(UNIT, MANY)


MAKE = {
    "attention": functools.partial(SelfAttention, 4, 2),
    "cross": functools.partial(CrossAttention, 2),
    "mlp": functools.partial(MLP, 13),
}


def test_a_block_is_its_three_residuals_in_order(draw):
    block = Block(**MAKE)
    variables = draw(block, X, context=CONTEXT)
    masks = attention.causal(), attention.key_lengths(jnp.array([7, 2, 4]))

    @jax.jit
    def both(variables, x):
        def part(name, x, *args):
            return PreNorm(MAKE[name]).apply({"params": variables["params"][name]}, x, *args)

        y = part("attention", x, masks[0])
        y = part("mlp", part("cross", y, CONTEXT, masks[1]))
        return y, block.apply(variables, x, masks[0], context=CONTEXT, context_mask=masks[1])

    expected, found = both(variables, X)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_residual_is_the_one_passed_in_around_each():
    block = Block(**MAKE, residual=functools.partial(SandwichNorm, norm=RMSNorm, scale_init=0.1))
    init = functools.partial(block.init, context=CONTEXT)
    for part in jax.eval_shape(init, jax.random.key(0), X)["params"].values():
        assert set(part) == {"norm", "norm_out", "inner", "scale"}


def test_the_bias_and_the_cache_reach_the_self_attention(draw):
    block = Block(MAKE["attention"], MAKE["mlp"])
    variables = draw(block, X)
    blind = jnp.where(jnp.arange(T) == 2, -jnp.inf, 0.0)  # nobody sees position 2
    moved = X.at[:, 2].add(1.0)
    apply = jax.jit(lambda x: block.apply(variables, x, bias=blind))
    difference = np.abs(apply(moved) - apply(X)).max((0, 2))
    assert (difference > 0).tolist() == [False, False, True, False, False]

    @jax.jit
    def both(x):
        cached = block.apply(variables, x, cache=KVCache.empty(B, 2, T, 2))
        return *cached, block.apply(variables, x, attention.causal())

    y, cache, expected = both(X)
    assert cache.length == T
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_context_without_cross_attention_is_refused_and_the_other_way_round():
    for block, kwargs in (
        (Block(**MAKE), {}),
        (Block(MAKE["attention"], MAKE["mlp"]), {"context": CONTEXT}),
    ):
        with pytest.raises(ValueError, match="context"):
            block.init(jax.random.key(0), X, **kwargs)


def test_a_block_can_be_made_of_any_mixer():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, bias=None, cache=None):
            return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)

    block = Block(Mean, MAKE["mlp"], residual=PostNorm)
    y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), X)
    assert y.shape == X.shape


def test_the_residual_around_the_attention_may_be_another():
    block = Block(functools.partial(SelfAttention, 2), INNER, attention_residual=NoNorm)
    parameters = jax.eval_shape(block.init, jax.random.key(0), X)["params"]
    assert {*parameters["attention"]} == {"inner"}
    assert {*parameters["mlp"]} == {"inner", "norm"}
