"""Dense attention against its formula in NumPy at float64, PyTorch, and its own properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention

CASES = {case.name: case for case in testing.attention_cases()}
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
SLACK = 8  # roundings that may add up, in units of the last place

draw = jax.jit(lambda mask, *lengths: mask.dense(*lengths), static_argnums=(1, 2))


def formula(q, k, v, allowed, bias, scale, softcap, sinks):
    """Attention one query at a time, as a sentence would say it."""
    batch, length, num_heads, head_dim = q.shape
    out = np.zeros((batch, length, num_heads, v.shape[-1]))
    scale = head_dim**-0.5 if scale is None else scale
    for b, t, n in np.ndindex(batch, length, num_heads):
        at = n // (num_heads // k.shape[2])
        x = scale * k[b, :, at] @ q[b, t, n]
        x = x if softcap is None else softcap * np.tanh(x / softcap)
        x = x if bias is None else x + np.broadcast_to(bias, allowed.shape)[b, n, t]
        seen = allowed[b, n, t]
        if seen.any():
            weights = np.exp(x[seen] - x[seen].max())
            sink = 0 if sinks is None else np.exp(sinks[n] - x[seen].max())
            out[b, t, n] = weights @ v[b, seen, at] / (weights.sum() + sink)
    return out


def values_and_gradients(f, x, cotangent):
    """Everything in one compilation."""

    def both(x, cotangent):
        y, pull_back = jax.vjp(f, x)
        return y, *pull_back(cotangent)

    return jax.jit(both)(x, cotangent)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name):
    inputs = CASES[name].inputs()
    x = {n: inputs.pop(n) for n in DIFFERENTIABLE if inputs[n] is not None}
    random = np.random.default_rng(0)
    shape = (*x["q"].shape[:3], x["v"].shape[-1])
    cotangent = jnp.asarray(random.standard_normal(shape), x["q"].dtype)
    mask = inputs.pop("mask")
    allowed = np.ones(1, bool) if mask is None else draw(mask, x["q"].shape[1], x["k"].shape[1])
    y, gradients = values_and_gradients(
        lambda x: attention.attend(**{**inputs, **x}, mask=mask), x, cotangent
    )
    assert y.dtype == CASES[name].dtype

    shape = (y.shape[0], y.shape[2], y.shape[1], x["k"].shape[1])
    inputs |= {"allowed": np.broadcast_to(allowed, shape), "bias": None, "sinks": None}
    wide = {n: np.asarray(a, np.float64) for n, a in x.items()}

    unit = float(jnp.finfo(y.dtype).eps) * SLACK
    np.testing.assert_allclose(np.float64(y), formula(**{**inputs, **wide}), rtol=unit, atol=unit)

    for n, gradient in gradients.items():
        direction, step = random.standard_normal(wide[n].shape), 1e-5
        ahead, behind = (
            formula(**{**inputs, **wide, n: wide[n] + sign * step * direction}) for sign in (1, -1)
        )
        expected = np.vdot(np.float64(cotangent), ahead - behind) / (2 * step)
        terms = np.float64(gradient) * direction
        assert abs(terms.sum() - expected) <= SLACK * unit * np.abs(terms).sum() + 1e-7, n


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_pytorch_and_its_gradients(causal):
    torch = pytest.importorskip("torch")
    x = testing.AttentionCase("", num_heads=15).inputs()
    arrays = x["q"], x["k"], x["v"]
    mask = attention.causal() if causal else None
    theirs = [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(a.transpose(1, 2) for a in theirs), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    expected.pow(2).sum().backward()

    y, gradients = values_and_gradients(
        lambda qkv: attention.attend(*qkv, mask), arrays, 2 * np.asarray(expected.detach())
    )
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-5, atol=1e-6)
    for found, other in zip(gradients, theirs):
        np.testing.assert_allclose(found, other.grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["explicit_empty", "causal_before_the_keys"])
def test_rows_that_may_look_nowhere_give_zeros_and_zero_gradients(name):
    inputs = CASES[name].inputs()
    mask = inputs["mask"]
    blind = ~np.asarray(mask.dense(13, 13)).any(axis=-1)[0, 0]
    blind = np.broadcast_to(blind, 13)
    assert blind.any()

    y, gradient = values_and_gradients(
        lambda q: attention.attend(q, inputs["k"], inputs["v"], mask),
        inputs["q"],
        jnp.ones((3, 13, 5, 7)),
    )
    assert (np.asarray(y)[:, blind] == 0).all()
    assert (np.asarray(gradient)[:, blind] == 0).all()
    assert np.isfinite(gradient).all()


def test_no_keys_at_all_give_zeros():
    x = testing.AttentionCase("", key_length=0).inputs()
    assert (attention.attend(**x) == 0).all()


def test_a_bias_of_minus_infinity_hides_a_key_with_finite_gradients():
    x = CASES["causal"].inputs()
    allowed = x["mask"].dense(13, 13)
    bias = jnp.where(allowed, 0, -jnp.inf).at[..., 0, :].set(-jnp.inf)
    y, gradient = jax.value_and_grad(
        lambda q: attention.attend(q, x["k"], x["v"], bias=bias).sum(), argnums=0
    )(x["q"])
    mask = x["mask"] & attention.explicit((jnp.arange(13) > 0)[:, None])
    np.testing.assert_allclose(y, attention.attend(x["q"], x["k"], x["v"], mask).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_causal_query_does_not_see_its_future():
    x = testing.AttentionCase("", batch=1, query_length=7, key_length=7).inputs()
    width = x["q"].shape[2] * x["q"].shape[3]

    def mix(z):
        z = z.reshape(1, 7, 5, 7)
        return attention.attend(z, z * x["k"], z + x["v"], attention.causal())[0]

    testing.assert_causal(mix, x["q"].reshape(7, width))


def test_reordering_the_keys_changes_nothing():
    x = CASES["everyone"].inputs()

    def reorder(kv):
        return jax.tree.map(lambda a: a[:, ::-1], kv)

    testing.assert_equivariant(
        lambda kv: attention.attend(x["q"], *kv), (x["k"], x["v"]), reorder, lambda y: y, atol=1e-6
    )


def test_large_logits_stay_finite():
    x = CASES["causal"].inputs()
    y = attention.attend(1e4 * x["q"], 1e4 * x["k"], x["v"], x["mask"])
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= np.abs(x["v"]).max()


def test_a_narrow_input_is_off_by_its_last_bits_only():
    x = CASES["bfloat16"].inputs()
    wide = {n: a.astype(jnp.float32) if n in "qkv" else a for n, a in x.items()}
    error = np.abs(np.float32(attention.attend(**x)) - attention.attend(**wide))
    assert error.max() <= 2**-8 * np.abs(wide["v"]).max()


SHAPES = {"q": (3, 5, 6, 7), "k": (3, 11, 2, 7), "v": (3, 11, 2, 13)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 6, 7)}, "q has B=2, k has B=3"),
        ({"v": (2, 11, 2, 13)}, "q has B=3, v has B=2"),
        ({"v": (3, 10, 2, 13)}, "k has S=11, v has S=10"),
        ({"v": (3, 11, 3, 13)}, "k has K=2, v has K=3"),
        ({"k": (3, 11, 2, 8)}, "q has H=7, k has H=8"),
        ({"q": (3, 5, 5, 7)}, "N=5 is not a multiple of K=2"),
        ({"q": (5, 6, 7)}, "q of rank 4"),
        ({"bias": (6, 5, 10)}, "bias has S=10, the attention has S=11"),
        ({"bias": (4, 5, 11)}, "bias has N=4, the attention has N=6"),
        ({"sinks": (5,)}, "N=6"),
    ],
)
def test_shapes_that_disagree_are_named_in_the_error(untyped, change, message):
    arrays = {name: jnp.ones(shape) for name, shape in (SHAPES | change).items()}
    with pytest.raises(ValueError, match=message):
        attention.attend(**arrays)


def test_masks_and_caps_that_cannot_be_are_named_in_the_error():
    q, k, v = (jnp.ones(shape) for shape in SHAPES.values())
    with pytest.raises(ValueError, match="mask has B=2, the attention has B=3"):
        attention.attend(q, k, v, attention.key_lengths(jnp.ones(2, int)))
    with pytest.raises(ValueError, match="softcap=0"):
        attention.attend(q, k, v, softcap=0.0)


def test_the_weights_are_those_of_the_values():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 5, n, 3)), "float32") for n in (4, 2, 2))
    options = {"sinks": jnp.asarray([0.0, 1.0, -1.0, 0.5]), "softcap": 3.0}
    weights = attention.weights(q, k, attention.window(2, -1), **options)
    assert weights.shape == (2, 4, 5, 5)
    y = jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, 2, axis=2))
    expected = attention.attend(q, k, v, attention.window(2, -1), **options)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert not np.asarray(weights)[:, :, 0].any()
    assert (np.asarray(weights)[:, :, 1:].sum(-1) < 1).all()
