import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import _flash_gpu, dense

LOWERS = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not LOWERS, reason="Mosaic GPU needs jax 0.11 or newer")
TILE = _flash_gpu.Tile(columns=32, parts=2)
QUICK = ("causal_offset_by_row", "grouped", "segments_cross", "everything_at_once")
CASES = [
    pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
    for case in testing.attention_cases()
]


def interpreted(f, *args):
    """Runs kernels on the CPU, in memory full of NaN; True if two threads raced."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    settings = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    try:
        with plgpu.force_gpu_interpret_mode(settings):
            results = jax.block_until_ready(f(*args))
        return results, gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def arguments(case, seed=0):
    given = case.inputs(seed)
    q, k, mask = given["q"], given["k"], given["mask"]
    if mask is not None:
        given["mask"] = mask.canonical(q.shape[1], k.shape[1])
    return given


def reference(q, k, v, *, mask, **options):
    """The result, and the logarithm of the sum: what weighs in with a key of value 0 beside."""
    out = dense.attend(q, k, v, mask, **options)
    length, num_heads = q.shape[1:3]
    k = jnp.repeat(k, num_heads // k.shape[2], axis=2)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    x = x * (q.shape[3] ** -0.5 if options["scale"] is None else options["scale"])
    if options["softcap"] is not None:
        x = options["softcap"] * jnp.tanh(x / options["softcap"])
    if options["bias"] is not None:
        bias = options["bias"].astype(jnp.float32)
        x = x + bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if mask is not None:
        x = jnp.where(mask.dense(length, k.shape[1]), x, -jnp.inf)
    if options["sinks"] is not None:
        sinks = jnp.broadcast_to(options["sinks"][None, :, None, None], (*x.shape[:3], 1))
        x = jnp.concatenate([x, sinks], -1)
    return out, jax.nn.logsumexp(x, -1).swapaxes(1, 2)


def pulled(kernel, given, d_out, d_lse):
    """Result and derivatives, of the kernels or of the reference."""
    q, k, v = given["q"], given["k"], given["v"]
    options = {name: x for name, x in given.items() if name not in "qkv"}
    if not kernel:
        results, pull = jax.vjp(functools.partial(reference, **options), q, k, v)
        return *results, *pull((d_out.astype(q.dtype), d_lse))
    mask = options.pop("mask")
    out, lse = _flash_gpu.forward(q, k, v, mask, **options, tile=TILE)
    found = _flash_gpu.backward(q, k, v, mask, out, lse, d_out, d_lse, **options, tile=TILE)
    return out, lse, *found[:3]


def size(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def check(case, slack=1.0):
    """Results and derivatives as exact as those of the plain form, and nothing raced."""
    given = arguments(case)
    random = np.random.default_rng(1)
    shape = (*given["q"].shape[:3], case.value_dim)
    d_out = jnp.asarray(random.standard_normal(shape, np.float32), case.dtype)
    d_lse = jnp.asarray(random.standard_normal(shape[:3], np.float32))
    seen_any = jnp.isfinite(pulled(False, given, d_out, 0 * d_lse)[1])
    d_lse = jnp.where(seen_any, d_lse, 0)
    found, raced = interpreted(lambda: pulled(True, given, d_out, d_lse))
    assert not raced
    narrow = pulled(False, given, d_out, 0 * d_lse)
    wide = {
        name: x.astype(jnp.float32) if name in ("q", "k", "v", "bias") and x is not None else x
        for name, x in given.items()
    }
    exact = pulled(False, wide, d_out, jnp.where(seen_any, d_lse, 0))
    plain = pulled(False, wide, d_out, 0 * d_lse)

    np.testing.assert_array_equal(np.isfinite(found[1]), seen_any)
    np.testing.assert_allclose(found[1][seen_any], exact[1][seen_any], rtol=2e-6, atol=2e-6)
    unit = float(jnp.finfo(case.dtype).eps)
    for name, x, y, low, high in zip(("out", "lse", *"qkv"), found, exact, narrow, plain):
        if name != "lse":
            error = np.asarray(x, np.float32) - np.asarray(y, np.float32)
            due = np.asarray(low, np.float32) - np.asarray(high, np.float32)
            # Weights and their slopes are rounded once to the narrow type, as is the result.
            allowed = 1.25 * size(due) + 0.25 * unit * size(y)
            assert size(error) <= slack * allowed, (name, size(error), size(due))
            largest = [float(np.abs(z).max(initial=0)) for z in (error, due, y)]
            allowed = max(1.25 * largest[1], unit * largest[2])
            assert largest[0] <= slack * allowed, (name, *largest)


@needs_mosaic
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_agree_with_dense_and_nothing_races(case):
    heads = {"num_heads": 2 * case.num_heads // case.num_kv_heads, "num_kv_heads": 2}
    if case.num_kv_heads == 1:
        heads = {"num_heads": 3, "num_kv_heads": 1}
    dtype = jnp.bfloat16 if case.dtype == jnp.float32 else case.dtype
    check(dataclasses.replace(case, **heads, batch=2, dtype=dtype))


@needs_mosaic
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 60))]
)
def test_a_drawn_case_agrees_with_dense_and_nothing_races(seed):
    case = testing.draw_attention_case(seed)
    if case.dtype == jnp.float32:
        case = dataclasses.replace(case, dtype=jnp.bfloat16)
    # The gradients start from the rounded result, which in a small case may weigh more.
    check(case, slack=1.5)


@needs_mosaic
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_many_steps_reuse_shared_memory_without_races(dtype):
    check(
        testing.AttentionCase(
            "many steps",
            lambda c: attention.causal(c.key_length - c.query_length) | attention.window(None, 90),
            batch=1,
            query_length=131,
            key_length=197,
            num_heads=2,
            num_kv_heads=1,
            head_dim=19,
            value_dim=67,
            dtype=dtype,
        )
    )


@needs_mosaic
def test_the_interpreter_sees_a_slot_overwritten_too_early(monkeypatch):
    from jaxformer.ops.attention import _flash_gpu_forward

    monkeypatch.setattr(_flash_gpu_forward, "wait_if_used", lambda *_: None)
    monkeypatch.setattr(_flash_gpu_forward, "drain", lambda *_: None)
    q = jnp.ones((1, 3, 1, 16), jnp.bfloat16)
    k = jnp.ones((1, 131, 1, 16), jnp.bfloat16)
    options = {"bias": None, "scale": 1.0, "softcap": None, "sinks": None}
    try:  # it also raises where nobody waits for a barrier
        _, caught = interpreted(lambda: _flash_gpu.forward(q, k, k, None, **options, tile=TILE))
    except jax.errors.JaxRuntimeError:
        caught = True
    assert caught


@needs_mosaic
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_the_scale_may_be_negative_zero_or_traced(scale):
    case = testing.AttentionCase(
        "scale", lambda c: attention.causal(), 1, 7, 5, 1, 1, 16, 16, dtype=jnp.bfloat16
    )
    given = arguments(case)
    options = {"bias": None, "softcap": None, "sinks": None}
    q, k, v, mask = (given[name] for name in ("q", "k", "v", "mask"))
    expected = dense.attend(q, k, v, mask, scale=scale)
    for form in (scale, jnp.float32(scale)):
        run = functools.partial(_flash_gpu.forward, scale=form, **options, tile=TILE)
        (out, _), _ = interpreted(run, q, k, v, mask)
        np.testing.assert_allclose(
            np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2**-7
        )


def shapes(dtype=jnp.bfloat16, head_dim=128, value_dim=128):
    x = jax.ShapeDtypeStruct((2, 300, 4, head_dim), dtype)
    return x, x, jax.ShapeDtypeStruct((2, 300, 4, value_dim), dtype)


def refusal(q, k, v) -> Any:
    return _flash_gpu.refuses(q, k, v, None, bias=None, scale=None, softcap=None, sinks=None)


@pytest.mark.skipif(LOWERS, reason="for jax before 0.11")
def test_an_older_jax_is_named():
    assert jax.__version__ in refusal(*shapes())


@needs_mosaic
def test_what_the_kernels_cannot_do_is_named():
    assert refusal(*shapes()) is None
    assert refusal(*shapes(head_dim=7, value_dim=256)) is None
    assert "float32" in refusal(*shapes(jnp.float32))
    assert "H=257" in refusal(*shapes(head_dim=257))
    assert "Hv=300" in refusal(*shapes(value_dim=300))
    q, k, _ = shapes()
    assert "one dtype" in refusal(q, k, shapes(jnp.float16)[2])


@needs_mosaic
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("value_dim", [64, 128, 256])
def test_tiles_fit_in_shared_memory(head_dim, value_dim):
    inner, outer = -(-head_dim // 64) * 64, value_dim
    if {inner, outer} != {192, 256}:  # which are padded alike
        forward = _flash_gpu._forward_tile(head_dim, value_dim)
        assert forward.stages > 1
        assert forward.columns % 64 == 0
        own = 128 * (inner + (outer if outer != inner else 0))
        assert 2 * (own + forward.stages * forward.columns * (inner + outer)) < 232_448
    for sums, widest in ((inner // 2, 128), (outer // 2, 64)):
        tile = _flash_gpu._backward_tile(inner, outer, sums, widest)
        rows_of_numbers = 4 * 3 * tile.stages * tile.columns
        used = 2 * (128 + tile.stages * tile.columns) * (inner + outer) + rows_of_numbers
        assert used < 232_448
        width = tile.columns // tile.parts
        assert width <= widest
        assert width % 64 == 0  # wgmma sums over whole swizzled rows


@needs_mosaic
@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        ((2, 16, 64, 4 << 20), 4),  # as many as the cache holds
        ((1, 13, 64, 4 << 20), 13),  # of two, the only divisor that fills the processors
        ((1, 12, 64, 48 << 20), 3),
        ((8, 16, 8, 1 << 20), 32),
        ((1, 2, 1, 1), 2),
    ],
)
def test_heads_are_taken_together(sizes, together):
    from jaxformer.ops.attention import _flash_gpu_forward

    assert _flash_gpu_forward.Grid(*sizes).together() == together
