"""A stack unrolled, scanned, and with remat is one and the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.layers import stack as stacks
from jaxformer.layers.attention import SelfAttention, cached_length
from jaxformer.layers.block import Block, PreNorm
from jaxformer.layers.mlp import MLP
from jaxformer.layers.stack import Stack
from jaxformer.ops import activations, attention

B, T, D, LAYERS = 2, 5, 8, 2
X = jax.random.normal(jax.random.key(0), (B, T, D))
ATTENTION = functools.partial(SelfAttention, 4, 2)
BLOCK = functools.partial(Block, ATTENTION, functools.partial(MLP, 13))


def sine(name):
    """A mixer that costs next to nothing to compile."""
    return lambda x, mask, **_: jnp.sin(x)


SMALL = functools.partial(Block, sine, functools.partial(MLP, 13, activations.relu))
DROPPING = functools.partial(SMALL, residual=functools.partial(PreNorm, dropout=0.2))


def stacked(variables):
    return {"params": stacks.stack_parameters(variables["params"])}


def values_and_gradients(stack, variables, **kwargs):
    """One compilation of the output and the gradients towards parameters and input."""

    @jax.jit
    def both(variables, x):
        f = functools.partial(stack.apply, mask=attention.causal(), **kwargs)
        y, pull_back = jax.vjp(f, variables, x)
        return y, *pull_back(jnp.cos(y))

    return both(variables, X)


def assert_same(found, expected, atol):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=atol)


def test_scanned_and_unrolled_agree_in_values_and_gradients(draw):
    unrolled = Stack(BLOCK, LAYERS)
    variables = draw(unrolled, X)
    y, gradients, for_x = values_and_gradients(unrolled, variables)
    found = values_and_gradients(Stack(BLOCK, LAYERS, scan=True), stacked(variables))
    assert_same(found, (y, stacked(gradients), for_x), atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_neither_values_nor_gradients_nor_what_is_dropped(draw, scan):
    variables = draw(Stack(DROPPING, LAYERS), X)
    variables = stacked(variables) if scan else variables
    plain, remat = (
        values_and_gradients(
            Stack(DROPPING, LAYERS, scan, remat),
            variables,
            train=True,
            rngs={"dropout": jax.random.key(1, impl="rbg")},
        )
        for remat in (False, True)
    )
    assert_same(remat, plain, atol=1e-5)


def test_parameters_survive_stacking_and_unstacking(draw):
    unrolled = draw(Stack(BLOCK, LAYERS), X)["params"]
    there = stacks.stack_parameters(unrolled)
    scanned = jax.eval_shape(Stack(BLOCK, LAYERS, scan=True).init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, there) == jax.tree.map(jnp.shape, scanned)
    back = stacks.unstack_parameters(there)
    assert jax.tree.structure(back) == jax.tree.structure(unrolled)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, unrolled))


def test_parameters_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers_0 among \['norm'\]"):
        stacks.stack_parameters({"norm": 0})
    with pytest.raises(ValueError, match=r"layers among \['layers_0'\]"):
        stacks.unstack_parameters({"layers_0": 0})


def test_scanned_layers_start_with_different_parameters():
    variables = jax.jit(Stack(SMALL, LAYERS, scan=True).init)(jax.random.key(0), X)
    kernel = variables["params"]["layers"]["mlp"]["inner"]["up"]["kernel"]
    assert kernel.shape == (LAYERS, D, 13)
    assert len({float(k[0, 0]) for k in kernel}) == LAYERS


def test_remat_takes_less_memory_and_a_policy_something_between():
    x = jnp.ones((4, 32, D))
    shapes = jax.eval_shape(Stack(SMALL, 16, scan=True).init, jax.random.key(0), x)

    def memory(**kwargs):
        stack = Stack(SMALL, 16, scan=True, **kwargs)
        gradient = jax.jit(jax.grad(lambda variables, x: stack.apply(variables, x).sum()))
        return gradient.lower(shapes, x).compile().memory_analysis().temp_size_in_bytes

    everything, nothing = memory(), memory(remat=True)
    some = memory(remat=True, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    assert 1.5 * nothing < some < everything / 1.5


@pytest.mark.parametrize(("layers", "expected"), [(1, [1.0]), (3, [0.0, 0.5, 1.0])])
@pytest.mark.parametrize("scan", [False, True])
def test_depth_runs_from_zero_to_one(layers, expected, scan):
    class Append(nn.Module):
        @nn.compact
        def __call__(self, x, *, cache, depth):
            return jnp.concatenate([x[..., 1:], jnp.full((1, 1, 1), depth)], axis=-1)

    y = Stack(Append, layers, scan).apply({}, jnp.zeros((1, 1, layers)))
    assert y[0, 0].tolist() == expected


def test_deeper_samples_are_dropped_more_often(draw):
    x = jnp.zeros((3000, 1, D))
    dropping = functools.partial(
        Block,
        lambda name: lambda x, *_, **__: jnp.zeros_like(x),
        lambda name: lambda x: jnp.ones_like(x),
        residual=functools.partial(PreNorm, drop_path=0.5),
    )
    for scan in (False, True):
        stack = Stack(dropping, 3, scan=scan)
        apply = jax.jit(functools.partial(stack.apply, train=True))
        y = apply(draw(stack, x), x, rngs={"dropout": jax.random.key(0)})[:, 0, 0]
        # Branches of depth 0, 1/2 and 1 add 1, 0 or 4/3, and 0 or 2.
        for total, share in ((1, 1 / 8), (7 / 3, 3 / 8), (3, 1 / 8), (13 / 3, 3 / 8)):
            found = np.isclose(y, total, atol=1e-5).mean()
            assert abs(found - share) <= 4 * (share * (1 - share) / len(x)) ** 0.5


def test_with_a_cache_the_stack_goes_on_where_it_was(draw):
    variables = draw(Stack(BLOCK, LAYERS), X)
    expected = jax.jit(functools.partial(Stack(BLOCK, LAYERS).apply, variables))(
        X, attention.causal()
    )
    stack = Stack(BLOCK, LAYERS, scan=True, remat=True)  # remat must not stand in the way
    variables = stacked(variables)

    @jax.jit
    def step(x, cache):
        return stack.apply(variables, x, attention.causal(cached_length(cache)), cache=cache)

    cache, out = stacks.empty_cache(LAYERS, True, B, 2, T, 2), []
    for part in (X[:, :3], X[:, 3:4], X[:, 4:]):
        y, cache = step(part, cache)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), expected, atol=1e-5)
    assert cached_length(cache) == T


@pytest.mark.parametrize(("layers", "scan"), [(LAYERS + 1, False), (LAYERS, True)])
def test_a_cache_of_another_stack_is_refused(draw, layers, scan):
    stack, cache = Stack(BLOCK, LAYERS), stacks.empty_cache(layers, scan, B, 2, T, 2)
    message = rf"num_layers=2 and scan=False .* num_layers={layers} and scan={scan}"
    with pytest.raises(ValueError, match=message):
        stack.apply(draw(stack, X), X, cache=cache)


def test_layers_that_share_are_one_block_after_itself(draw):
    shared = Stack(BLOCK, 4, distinct=2)
    variables = draw(shared, X)
    params = variables["params"]
    assert {*params} == {"layers_0", "layers_1"}
    each = {"params": {f"layers_{i}": params[f"layers_{i // 2}"] for i in range(4)}}
    assert_same(shared.apply(variables, X), Stack(BLOCK, 4).apply(each, X), atol=1e-6)


def test_scanned_layers_may_share_one_block(draw):
    unrolled = Stack(SMALL, 3, distinct=1)
    variables = draw(unrolled, X)
    one = {"params": {"layers": variables["params"]["layers_0"]}}
    found = values_and_gradients(Stack(SMALL, 3, scan=True, distinct=1), one)
    y, gradients, for_x = values_and_gradients(unrolled, variables)
    gradients = {"params": {"layers": gradients["params"]["layers_0"]}}
    assert_same(found, (y, gradients, for_x), atol=2e-5)
    shapes = jax.eval_shape(Stack(SMALL, 3, scan=True, distinct=1).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distinct": 3}, "4 layers cannot share 3 blocks equally"),
        ({"distinct": 0}, "4 layers cannot share 0 blocks"),
        ({"distinct": 2, "scan": True}, "scanned ones one block"),
    ],
)
def test_blocks_that_cannot_be_shared_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stack(SMALL, 4, **options).init(jax.random.key(0), X)
