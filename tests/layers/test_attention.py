"""Attention layers against PyTorch and a formula in NumPy; the cache against no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.layers.attention import CrossAttention, KVCache, SelfAttention, cached_length
from jaxformer.layers.norms import RMSNorm
from jaxformer.ops import attention, rotary

B, T, S, D, C = 3, 7, 11, 10, 13
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((B, T, D)), jnp.float32)
CONTEXT = jnp.asarray(RANDOM.standard_normal((B, S, C)), jnp.float32)
GROUPED = SelfAttention(6, 2, 4, rotate=rotary.rotate, norm=RMSNorm, use_bias=True)


def values_and_gradients(f, *args):
    y, pull_back = jax.vjp(f, *args)
    return y, *pull_back(jnp.cos(y))


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-4, atol=1e-5)


def torch_linear(torch, weight, bias, parameters):
    """Copies the parameters of a Dense into torch's tensors."""
    with torch.no_grad():
        weight.copy_(torch.tensor(np.asarray(parameters["kernel"]).T))
        bias.copy_(torch.tensor(np.asarray(parameters["bias"])))


def test_self_attention_is_that_of_pytorch_in_values_and_gradients(draw):
    torch = pytest.importorskip("torch")
    layer = SelfAttention(2, use_bias=True)
    variables = draw(layer, X)
    parameters = variables["params"]
    theirs = torch.nn.MultiheadAttention(D, 2, batch_first=True)
    torch_linear(torch, theirs.in_proj_weight, theirs.in_proj_bias, parameters["qkv"])
    torch_linear(torch, theirs.out_proj.weight, theirs.out_proj.bias, parameters["out"])
    x = torch.tensor(np.asarray(X), requires_grad=True)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    expected.backward(expected.detach().cos())

    @jax.jit
    def ours(variables, x):
        f = functools.partial(layer.apply, mask=attention.causal())
        return values_and_gradients(f, variables, x)

    y, for_variables, for_x = ours(variables, X)
    found = for_variables["params"]
    assert_all_close(
        [y, for_x, found["qkv"]["kernel"].T, found["out"]["kernel"].T, found["qkv"]["bias"]],
        [expected, x.grad, theirs.in_proj_weight.grad, theirs.out_proj.weight.grad]
        + [theirs.in_proj_bias.grad],
    )


def test_cross_attention_is_that_of_pytorch_in_values_and_gradients(draw):
    torch = pytest.importorskip("torch")
    layer = CrossAttention(2)
    variables = draw(layer, X, CONTEXT)
    parameters = jax.tree.map(np.array, variables["params"])
    theirs = torch.nn.MultiheadAttention(D, 2, bias=False, kdim=C, vdim=C, batch_first=True)
    key, value = np.split(parameters["kv"]["kernel"].T, 2)
    for weight, values in (
        (theirs.q_proj_weight, parameters["q"]["kernel"].T),
        (theirs.k_proj_weight, key),
        (theirs.v_proj_weight, value),
        (theirs.out_proj.weight, parameters["out"]["kernel"].T),
    ):
        weight.data = torch.tensor(values)
    lengths = np.array([S, 5, 1])
    padding = torch.tensor(np.arange(S)[None] >= lengths[:, None])
    x, context = (torch.tensor(np.asarray(a), requires_grad=True) for a in (X, CONTEXT))
    expected, _ = theirs(x, context, context, key_padding_mask=padding, need_weights=False)
    expected.backward(expected.detach().cos())

    @jax.jit
    def ours(x, context):
        mask = attention.key_lengths(jnp.asarray(lengths))
        return values_and_gradients(lambda *a: layer.apply(variables, *a, mask), x, context)

    assert_all_close(ours(X, CONTEXT), [expected, x.grad, context.grad])


def turn(x, places):
    """Rotary positions as complex numbers."""
    half = x.shape[-1] // 2
    angles = places[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def grouped_formula(parameters, x, bias, places):
    """What GROUPED does, one head at a time."""
    p = jax.tree.map(np.float64, parameters)

    def norm(name, heads):
        return heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]

    fused = (x @ p["qkv"]["kernel"] + p["qkv"]["bias"]).reshape(*x.shape[:2], 10, 4)
    q = turn(norm("q_norm", fused[:, :, :6]), places)
    k, v = turn(norm("k_norm", fused[:, :, 6:8]), places), fused[:, :, 8:]
    out = []
    for n in range(6):
        logits = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // 3]) / 2 + bias[:, n]
        weights = np.exp(logits)
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, :, n // 3])
    return np.concatenate(out, axis=-1) @ p["out"]["kernel"] + p["out"]["bias"]


def test_grouped_queries_qk_norm_rotation_and_bias_follow_the_formula(draw):
    variables = draw(GROUPED, X)
    bias = jnp.asarray(RANDOM.standard_normal((1, 6, T, T)), jnp.float32)
    places = np.array([0, 1, 2, 5, 6, 7, 11])
    y = jax.jit(lambda x: GROUPED.apply(variables, x, positions=jnp.asarray(places), bias=bias))(X)
    expected = grouped_formula(variables["params"], np.float64(X), np.float64(bias), places)
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_cross_attention_goes_by_kept_keys_and_values_and_writes_its_weights_down(draw):
    layer = CrossAttention(
        4, 2, 3, norm=RMSNorm, use_bias=True, out_bias=False, scale=0.7, attend=attention.attend
    )
    random = np.random.default_rng(3)
    x, context = (jnp.asarray(random.standard_normal((2, n, 5)), jnp.float32) for n in (3, 7))
    variables, mask = draw(layer, x, context), attention.key_lengths(jnp.array([7, 4]))
    assert "bias" not in variables["params"]["out"]
    y, seen = layer.apply(variables, x, context, mask, mutable=["attention"])
    again, kept = layer.apply(variables, x, context, mask, keep=True)
    np.testing.assert_array_equal(y, again)
    assert kept.keys.shape == kept.values.shape == (2, 2, 7, 3)
    np.testing.assert_allclose(layer.apply(variables, x, kept, mask), y, atol=1e-6)
    weights = seen["attention"]["weights"][0]
    assert weights.shape == (2, 4, 3, 7)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not np.asarray(weights[1, ..., 4:]).any()
    other = layer.copy(scale=None).apply(variables, x, context, mask)
    assert np.abs(other - y).max() > 1e-4


def test_qk_norm_makes_attention_ignore_the_size_of_queries_and_keys(draw):
    variables = draw(layer := CrossAttention(2, norm=RMSNorm), X, CONTEXT)
    apply = jax.jit(layer.apply)
    larger = jax.tree.map(lambda a: a, variables)
    larger["params"]["q"] = {"kernel": 100 * variables["params"]["q"]["kernel"]}
    np.testing.assert_allclose(apply(larger, X, CONTEXT), apply(variables, X, CONTEXT), atol=1e-5)


def test_with_a_cache_each_token_sees_its_past_and_past_the_end_all_is_nan(draw):
    variables = draw(GROUPED, X)
    expected = jax.jit(lambda x: GROUPED.apply(variables, x, attention.causal()))(X)
    step = jax.jit(lambda x, cache: GROUPED.apply(variables, x, cache=cache))
    out, cache = [], KVCache.empty(B, 2, T, 4)
    for part in jnp.split(X, [4, 5, 6], axis=1):
        y, cache = step(part, cache)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), expected, atol=1e-5)
    assert cached_length(jax.tree.map(lambda a: a[None], cache)) == cache.length == T
    y, _ = step(X[:, :1], cache)
    assert np.isnan(y).all()

    y, narrow = step(X, KVCache.empty(B, 2, T + 2, 4, jnp.bfloat16))
    np.testing.assert_allclose(y, expected, atol=0.03)
    assert y.dtype == jnp.float32
    assert narrow.keys.dtype == narrow.values.dtype == jnp.bfloat16


def test_a_mask_of_ones_own_may_stand_for_the_past(draw):
    variables = draw(GROUPED, X)

    @jax.jit
    def both(x):
        _, cache = GROUPED.apply(variables, x[:, :5], cache=KVCache.empty(B, 2, T, 4))
        y, _ = GROUPED.apply(variables, x[:, 5:], attention.window(2, 0, 5), cache=cache)
        return y, GROUPED.apply(variables, x, attention.window(2, 0))[:, 5:]

    y, expected = both(X)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_more_tokens_than_the_cache_has_room_for_are_refused():
    init = functools.partial(GROUPED.init, cache=KVCache.empty(B, 2, 5, 4))
    with pytest.raises(ValueError, match=r"S=5 .* T=7"):
        jax.eval_shape(init, jax.random.key(0), X)


@pytest.mark.parametrize("use_bias", [False, True])
def test_narrow_inputs_give_narrow_outputs_with_wide_parameters(use_bias):
    x, context = X.astype(jnp.bfloat16), CONTEXT.astype(jnp.bfloat16)
    itself = SelfAttention(2, rotate=None, norm=RMSNorm, use_bias=use_bias)
    for layer, args in ((itself, (x,)), (CrossAttention(2, use_bias=use_bias), (x, context))):
        y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), *args)
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("make", [SelfAttention, CrossAttention])
def test_attention_product_and_initializer_are_the_ones_passed_in(make):
    products = []

    def project(x, kernel):
        products.append(kernel.shape)
        return x @ kernel

    def attend(q, k, v, mask, *, bias):
        return jnp.ones((*q.shape[:3], v.shape[3]))

    layer = make(2, project=project, attend=attend, out_init=nn.initializers.ones)
    args = (X,) if make is SelfAttention else (X, CONTEXT)
    y, _ = jax.jit(layer.init_with_output)(jax.random.key(0, impl="rbg"), *args)
    assert (y == D).all()
    assert products[-1] == (D, D)
    assert len(products) == len(args) + 1


@pytest.mark.parametrize("make", [SelfAttention, CrossAttention])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "D=10 is not a multiple of N=3"),
        ({"num_heads": 5, "num_kv_heads": 2}, "N=5 .* K=2"),
        ({"num_heads": 5, "num_kv_heads": 0}, "N=5 .* K=0"),
        ({"num_heads": 0}, "N=0"),
    ],
)
def test_heads_that_do_not_divide_are_named_in_the_error(make, sizes, message):
    args = (X,) if make is SelfAttention else (X, CONTEXT)
    with pytest.raises(ValueError, match=message):
        make(**sizes).init(jax.random.key(0), *args)


def test_keys_may_lack_the_bias_that_queries_and_values_have(draw):
    layer, whole = (SelfAttention(6, 2, 4, use_bias=True, key_bias=x) for x in (False, True))
    params = draw(layer, X)["params"]
    assert params["q_bias"].shape == (24,)
    assert params["v_bias"].shape == (8,)
    bias = jnp.concatenate([params["q_bias"], jnp.zeros(8), params["v_bias"]])
    same = {"qkv": params["qkv"] | {"bias": bias}, "out": params["out"]}
    found, expected = (m.apply({"params": p}, X) for m, p in ((layer, params), (whole, same)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    bare = SelfAttention(6, 2, 4, key_bias=False)
    assert "q_bias" not in draw(bare, X)["params"]
