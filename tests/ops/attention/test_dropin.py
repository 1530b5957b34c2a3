"""The drop-ins give the numbers of what they replace, and refuse by name what they cannot give."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.ops.attention import dropin

EPS = float(jnp.finfo(jnp.float32).eps)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(t=5, s=7, n=6, k=3, b=2, h=11, dtype=jnp.float32):
    return (
        draw(b, t, n, h, seed=1, dtype=dtype),
        draw(b, s, k, h, seed=2, dtype=dtype),
        draw(b, s, k, h, seed=3, dtype=dtype),
    )


def assert_same(one, other, *arrays, units=64, eps=EPS):
    """Outputs and gradients agree; sums of some 10 terms of about 1 err by a few eps each."""

    def weighed(f):
        def total(*arrays):
            outputs = jax.tree.leaves(f(*arrays))
            return sum((x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in outputs)

        return jax.jit(lambda *x: (f(*x), jax.grad(total, tuple(range(len(x))))(*x)))

    found, expected = (jax.tree.leaves(weighed(f)(*arrays)) for f in (one, other))
    lowest = float(jnp.finfo(jnp.float32).min) / 2  # of the residual of a row that looks nowhere
    scale = max(float(jnp.abs(jnp.where(x < lowest, 0, x)).max()) for x in expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        x, y = np.float64(x), np.float64(y)
        np.testing.assert_allclose(x, y, rtol=2 * eps, atol=units * eps * scale)


JAX_CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "queries that end": {"query_seq_lengths": jnp.array([3, 5], jnp.int32)},
    "keys that end, in one row at once": {"key_value_seq_lengths": jnp.array([0, 4], jnp.int32)},
    "both end": {
        "query_seq_lengths": jnp.array([0, 4], jnp.int32),
        "key_value_seq_lengths": jnp.array([2, 0], jnp.int32),
    },
    "window": {"local_window_size": 1},
    "lopsided window, causal": {"local_window_size": (2, 1), "is_causal": True},
    "window ahead": {"local_window_size": (-4, 9)},
    "mask": {"mask": draw(2, 6, 5, 7) > 0.8},
    "mask of a row for all heads": {"mask": draw(2, 1, 1, 7) > 0},
    "mask of rank 3": {"mask": draw(6, 5, 7) > 0},
    "everything": {
        "mask": draw(1, 6, 1, 7) > -1,
        "is_causal": True,
        "local_window_size": (3, 3),
        "query_seq_lengths": jnp.array([5, 4], jnp.int32),
        "key_value_seq_lengths": jnp.array([7, 3], jnp.int32),
        "scale": 0.2,
    },
}


def test_the_signature_is_that_of_jax():
    ours, theirs = (
        inspect.signature(f).parameters
        for f in (dropin.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    for name, parameter in ours.items():
        if name != "return_residual":  # jax's overloads leave its default out
            assert parameter.default == theirs[name].default, name


@pytest.mark.parametrize("name", JAX_CASES)
def test_numbers_and_gradients_are_those_of_jax(name):
    options = JAX_CASES[name] | {"return_residual": True}
    bias = draw(1, 6, 5, 7, seed=4)
    assert_same(
        *(
            lambda q, k, v, bias, f=f: f(q, k, v, bias, **options)
            for f in (dropin.dot_product_attention, jax.nn.dot_product_attention)
        ),
        *qkv(),
        bias,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_numbers_keep_their_dtype(dtype):
    # The original rounds the weights after dividing, this one before: some eps of a mean of values.
    q, k, v = qkv(dtype=dtype)
    options = {"is_causal": True, "return_residual": True}
    found = dropin.dot_product_attention(q, k, v, **options)
    expected = jax.nn.dot_product_attention(q, k, v, **options)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype == dtype
        np.testing.assert_allclose(
            np.float32(one), np.float32(other), atol=8 * float(jnp.finfo(dtype).eps)
        )


def test_one_text_without_an_axis_for_the_batch():
    q, k, v = (x[0] for x in qkv())
    lengths = jnp.array([6], jnp.int32)
    assert_same(
        *(
            lambda q, k, v, f=f: f(
                q, k, v, key_value_seq_lengths=lengths, return_residual=True, is_causal=True
            )
            for f in (dropin.dot_product_attention, jax.nn.dot_product_attention)
        ),
        q,
        k,
        v,
    )


def test_numpy_arrays_are_welcome():
    q, k, v = (np.asarray(x) for x in qkv())
    found = dropin.dot_product_attention(q, k, v, mask=np.ones((1, 1, 5, 7), bool))
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(q, k, v), atol=16 * EPS)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"implementation": "cudnn"}, NotImplementedError, "cudnn"),
        ({"implementation": "nonsense"}, ValueError, "nonsense"),
        ({"mask": jnp.ones((1, 1, 5, 7))}, ValueError, "boolean"),
        ({"mask": jnp.ones((1, 1, 5, 3), bool)}, ValueError, "S=3"),
        ({"key_value_seq_lengths": jnp.ones(3, jnp.int32)}, ValueError, "key_value_seq_lengths"),
        ({"query_seq_lengths": jnp.ones(2)}, ValueError, "query_seq_lengths"),
        ({"local_window_size": (-3, 1)}, ValueError, "empty"),
    ],
)
def test_what_jax_would_refuse_or_cannot_be_honoured_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        dropin.dot_product_attention(*qkv(), **options)


def test_dtypes_that_differ_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="bfloat16"):
        dropin.dot_product_attention(q, k.astype(jnp.bfloat16), v)


# Flax.


@pytest.mark.parametrize("original", [nn.dot_product_attention, nnx.dot_product_attention])
def test_every_argument_of_the_originals_has_a_place(original):
    ours = inspect.signature(dropin.attention_fn).parameters
    theirs = inspect.signature(original).parameters
    assert set(theirs) <= set(ours)
    assert list(theirs)[:12] == list(ours)[:12]
    for name, parameter in theirs.items():
        if name != "promote_dtype":
            assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
@pytest.mark.parametrize("masked", ["none", "alike", "broadcast", "each"])
def test_numbers_and_gradients_are_those_of_linen_for_any_batch(shape, masked):
    q, k, v = (draw(*shape, n, 3, 11, seed=n) for n in (5, 7, 8))
    v, bias = v[..., :7, :, :5], draw(3, 5, 7, seed=4)
    mask = {
        "none": None,
        "alike": nn.make_causal_mask(jnp.ones(7))[0, :5],  # floats
        "broadcast": draw(*shape[:-1], *(1 for _ in shape[-1:]), 1, 5, 7) > 0.5,
        "each": draw(*shape, 3, 5, 7) > 1.0,  # with rows that may look nowhere
    }[masked]
    with jax.numpy_rank_promotion("allow"):
        assert_same(
            *(
                lambda q, k, v, bias, f=f: f(q, k, v, bias, mask, deterministic=True)
                for f in (dropin.attention_fn, nn.dot_product_attention)
            ),
            q,
            k,
            v,
            bias,
        )


def test_integers_and_mixed_dtypes_promote_as_in_linen():
    q, k, v = (draw(2, 5, 3, 7, seed=n) for n in range(3))
    for one, dtype in ((jnp.bfloat16, None), (jnp.float32, jnp.bfloat16), (jnp.int32, None)):
        arrays = (q.astype(one), k, v) if one != jnp.int32 else (q.astype(one),) * 3
        found, expected = (
            f(*arrays, dtype=dtype, deterministic=True)
            for f in (dropin.attention_fn, nn.dot_product_attention)
        )
        assert found.dtype == expected.dtype
        atol = 8 * float(jnp.finfo(found.dtype).eps)
        np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=atol)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}, "dropout_rate"),
        ({"module": nn.Dense(3)}, "module"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum"),
        ({"input_positions": jnp.arange(5)}, "input_positions"),
        ({"precision": jax.lax.DotAlgorithmPreset.F16_F16_F16}, "precision"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(options, words):
    with pytest.raises(NotImplementedError, match=words):
        dropin.attention_fn(*(draw(2, 5, 3, 7),) * 3, **options)


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH, ("default", None)])
def test_a_precision_at_most_is_honoured(precision):
    x = draw(2, 5, 3, 7)
    found = dropin.attention_fn(x, x, x, precision=precision)
    np.testing.assert_array_equal(found, dropin.attention_fn(x, x, x))


def test_batches_that_differ_are_refused():
    q, k = draw(2, 5, 3, 7), draw(3, 5, 3, 7)
    with pytest.raises((ValueError, TypeError), match=r"B=\(3,\)|\*B"):
        dropin.attention_fn(q, k, k)


def linen(**options):
    return nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=21, **options)


@pytest.mark.parametrize("kind", ["causal", "padding", "both"])
def test_a_linen_model_gains_it_in_one_line(kind):
    x, lengths = draw(2, 13, 5), jnp.array([11, 0])
    causal = nn.make_causal_mask(jnp.ones((2, 13)))
    padding = (jnp.arange(13)[None] < lengths[:, None])[:, None, None]
    mask = {"causal": causal, "padding": padding}.get(kind, nn.combine_masks(causal, padding))
    theirs, ours = linen(), linen(attention_fn=dropin.attention_fn)
    params = theirs.init(jax.random.key(0), x)
    assert_same(
        *(lambda params, x, m=m: m.apply(params, x, mask=mask) for m in (ours, theirs)), params, x
    )


def test_a_linen_model_decodes_with_its_cache():
    x = draw(2, 5, 7)
    found = {}
    for name, options in (("ours", {"attention_fn": dropin.attention_fn}), ("theirs", {})):
        model = linen(decode=True, **options)
        variables = model.init(jax.random.key(0), x)
        params, cache = variables["params"], variables["cache"]
        step = jax.jit(
            lambda cache, token, model=model, params=params: model.apply(
                {"params": params, "cache": cache}, token, mutable=["cache"]
            )
        )
        found[name] = []
        for t in range(5):
            y, state = step(cache, x[:, t : t + 1])
            cache = state["cache"]
            found[name].append(y)
    np.testing.assert_allclose(np.array(found["ours"]), np.array(found["theirs"]), atol=64 * EPS)


def test_a_linen_model_with_dropout_trains_only_where_it_is_deterministic():
    x = draw(2, 5, 7)
    model = linen(attention_fn=dropin.attention_fn, dropout_rate=0.5)
    params = model.init(jax.random.key(0), x, deterministic=True)
    assert model.apply(params, x, deterministic=True).shape == x.shape
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        model.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(NotImplementedError, match="module"):
        model.apply(params, x, deterministic=True, sow_weights=True, mutable=["intermediates"])


def of_nnx(**options):
    return nnx.MultiHeadAttention(3, 7, 21, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_nnx_model_gains_it_in_one_line(is_causal, masked):
    x = draw(2, 13, 7)
    mask = draw(2, 1, 13, 13) > 0.5 if masked else None
    models = [nnx.split(of_nnx(**o)) for o in ({"attention_fn": dropin.attention_fn}, {})]

    def f(graph):
        return lambda x, state: nnx.merge(graph, state)(x, mask=mask, is_causal=is_causal)

    params = nnx.state(of_nnx(), nnx.Param)
    assert_same(*(f(graph) for graph, _ in models), x, params)


def test_no_array_as_large_as_the_weights_is_made():
    x = jax.ShapeDtypeStruct((1, 4099, 21), jnp.float32)
    models = {"ours": linen(attention_fn=dropin.attention_fn), "theirs": linen()}
    params = jax.eval_shape(models["ours"].init, jax.random.key(0), x)

    def largest(jaxpr):
        found = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        for e in jaxpr.eqns:
            for value in jax.tree.leaves(e.params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    found.append(largest(inner))
        return max(found, default=0)

    def gradient(model):
        return jax.make_jaxpr(jax.grad(lambda p, x: model.apply(p, x).sum()))(params, x).jaxpr

    assert largest(gradient(models["theirs"])) == 3 * 4099**2
    assert largest(gradient(models["ours"])) < 4099**2 / 8
