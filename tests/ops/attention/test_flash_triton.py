"""The Triton kernels, interpreted, are dense attention; for CUDA they lower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import _flash_triton, dense

SLACK = 16  # roundings that may add up, in units of the last place
SIZES = _flash_triton.BlockSizes(outer=32, inner=16)
HOW = {"block_sizes": SIZES, "interpret": True}
NAMES = ("out", "lse", "q", "k", "v")


def stretched(case):
    """Lengths of several blocks, none of them a multiple of one."""
    longer = {1: 1, 5: 37, 7: 43, 13: 47, 17: 61}
    lengths = {n: longer[getattr(case, n)] for n in ("query_length", "key_length")}
    return dataclasses.replace(case, **lengths)


CASES = {case.name: stretched(case) for case in testing.attention_cases()}
OFTEN = {
    "causal_offset_by_row",
    "segments_cross",
    "one_key_head",
    "one_query",
    "sinks_over_nothing",
    "everything_at_once",
}


def kernels(x, d_out, d_lse):
    """Values and gradients of the kernels, in the order of `NAMES`."""
    q, k, v = map(x.get, "qkv")
    mask = x["mask"] and x["mask"].canonical(q.shape[1], k.shape[1])
    options = {n: x[n] for n in ("bias", "scale", "softcap", "sinks")}
    assert _flash_triton.refuses(q, k, v, mask, **options) is None
    out, lse = _flash_triton.forward(q, k, v, mask, **options, **HOW)
    given = (q, k, v, mask, out, lse, d_out, d_lse)
    return out, lse, *_flash_triton.backward(*given, **options, **HOW)[:3]


def meaning(x, d_out, d_lse):
    """The same of dense attention."""

    def f(q, k, v):
        return dense.attend(**{**x, "q": q, "k": k, "v": v}, return_lse=True)

    (out, lse), pull_back = jax.vjp(f, *map(x.get, "qkv"))
    return out, lse, *pull_back((d_out, d_lse))


def computed(case, *functions, **changes):
    """What functions make of a case and of gradients drawn for its results, compiled as one."""
    x = case.inputs()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    x |= {"scale": scale} | {n: change(x) for n, change in changes.items()}
    random = np.random.default_rng(1)
    shape = (case.batch, case.query_length, case.num_heads)
    d_out = jnp.asarray(random.standard_normal((*shape, case.value_dim)), case.dtype)
    d_lse = jnp.asarray(random.standard_normal(shape), jnp.float32)
    static = {n: x.pop(n) for n in list(x) if isinstance(x[n], float)}
    run = jax.jit(lambda x, *gradients: [f({**x, **static}, *gradients) for f in functions])
    return run(x, d_out, d_lse)


def assert_close(found, expected, dtype):
    for name, one, other in zip(NAMES, found, expected):
        assert one.dtype == other.dtype, name
        one, other = np.float64(one), np.float64(other)
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other), name)
        one, other = (np.where(np.isfinite(y), y, 0) for y in (one, other))
        unit = SLACK * float(jnp.finfo(jnp.float32 if name == "lse" else dtype).eps)
        atol = unit * max(np.abs(other).max(), 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_values_and_gradients_are_those_of_dense_attention(name):
    assert_close(*computed(CASES[name], kernels, meaning), CASES[name].dtype)


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 200))]
)
def test_a_drawn_case_is_dense_attention(seed):
    case = testing.draw_attention_case(seed)
    assert_close(*computed(case, kernels, meaning), case.dtype)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_traced_scale_may_have_any_sign(scale):
    case = dataclasses.replace(CASES["window"], num_kv_heads=1)
    found = computed(case, kernels, meaning, scale=lambda x: jnp.array(scale))
    assert_close(*found, case.dtype)


def test_logits_of_ten_thousand_stay_finite():
    case = CASES["causal_key_lengths"]
    found, expected = computed(case, kernels, meaning, q=lambda x: 1e4 * x["q"])
    assert all(np.isfinite(y).all() for n, y in zip(NAMES, found) if n != "lse")
    assert_close(found[:1], expected[:1], case.dtype)


def test_a_bias_of_minus_infinity_hides():
    case = dataclasses.replace(CASES["bias_by_key"], bias="1NTS")

    def bias(x):
        return x["bias"].at[:, :, 20:].set(-jnp.inf).at[..., :17].set(-jnp.inf)

    found, expected = computed(case, kernels, meaning, bias=bias)
    assert_close(found, expected, case.dtype)
    assert not found[0][:, 20:].any()
    assert (found[0][:, :20] != 0).all()


def test_errors_are_those_of_the_unfused_form_in_the_same_dtype():
    case = dataclasses.replace(CASES["everyone"], head_dim=16, dtype=jnp.bfloat16)

    def wide(x, d_out, d_lse):
        x = {**x, **{n: x[n].astype(jnp.float32) for n in "qkv"}}
        return meaning(x, d_out.astype(jnp.float32), d_lse)

    found, unfused, exact = computed(case, kernels, meaning, wide)
    for name, one, other, true in zip(NAMES, found, unfused, exact):
        error, usual = (np.linalg.norm(np.float64(y) - np.float64(true)) for y in (one, other))
        assert name == "lse" or 0 < error <= 1.25 * usual, name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": jnp.zeros((3, 13, 5, 7), jnp.bfloat16)}, "k: bfloat16"),
        ({n: np.zeros((3, 13, 5, 7)) for n in "qkv"}, "q: float64"),
        ({n: jnp.zeros((3, 13, 5, 257)) for n in "qk"}, "H=257"),
        ({"v": jnp.zeros((3, 13, 5, 260))}, "Hv=260"),
        ({n: jnp.zeros((3, 0, 5, 7)) for n in "kv"}, "S=0"),
        ({"q": jnp.zeros((3, 0, 5, 7))}, "T=0"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_number(change, reason):
    x = testing.AttentionCase("").inputs() | change
    assert reason in _flash_triton.refuses(**x)


def test_a_jax_without_the_backend_is_refused(monkeypatch):
    monkeypatch.setattr(_flash_triton, "triton", None)
    assert "no Triton backend" in _flash_triton.refuses(**testing.AttentionCase("").inputs())


def test_a_gradient_of_the_bias_is_refused():
    case = CASES["bias"]
    with pytest.raises(NotImplementedError, match="bias"):
        computed(
            case,
            lambda x, *g: _flash_triton.backward(
                *map(x.get, "qkv"),
                x["mask"],
                g[0],
                g[1],
                *g,
                **{n: x[n] for n in ("bias", "scale", "softcap", "sinks")},
                bias_gradient=True,
            ),
        )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_every_option_lowers_for_cuda():
    def mask(c):
        ids = jnp.zeros((c.batch, c.query_length), jnp.int32)
        holes = jnp.ones((1, c.num_heads, c.query_length, c.key_length), bool)
        pattern = attention.coarse(attention.causal(), 3, 5) | attention.window(9, 2, jnp.array(1))
        pattern = pattern & attention.segments(ids) | attention.key_lengths(jnp.arange(c.batch))
        return pattern & attention.local_global(7) | attention.strided(6) & attention.explicit(
            holes
        )

    case = testing.AttentionCase(
        *("", mask, 2, 77, 77, 6, 3, 40, 72), bias="1NTS", softcap=3.0, sinks=True
    )
    case = dataclasses.replace(case, dtype=jnp.bfloat16)
    x = case.inputs() | {"scale": 0.2}
    static = {"scale": 0.2, "softcap": 3.0}
    x = {n: y for n, y in x.items() if n not in static}
    d_out = jnp.zeros((2, 77, 6, 72), case.dtype)
    d_lse = jnp.zeros((2, 77, 6))

    def f(x, d_out, d_lse):
        options = {n: x[n] for n in ("bias", "sinks")} | static
        out, lse = _flash_triton.forward(*map(x.get, "qkv"), x["mask"], **options)
        given = (*map(x.get, "qkv"), x["mask"], out, lse, d_out, d_lse)
        return _flash_triton.backward(*given, **options)

    facts = {"device_kind": "NVIDIA H200", "num_cores": 132, "platform": "cuda"}
    fields = {field.name for field in dataclasses.fields(AbstractDevice)}
    device = AbstractDevice(**{n: fact for n, fact in facts.items() if n in fields})
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(f).trace(x, d_out, d_lse).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for kernel in ("forward_kernel", "query_kernel", "key_kernel"):
        assert kernel in text
