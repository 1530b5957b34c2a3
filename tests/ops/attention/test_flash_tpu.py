"""The TPU kernels, interpreted, are dense attention; for a chip that nobody has they compile."""

import dataclasses
import functools
import os
import pathlib
import runpy
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import _flash_tpu, _tpu_blocks, dense

MANY_BLOCKS = _flash_tpu.Cut(8, 4, 4, 4, 2)
NAMES = ("out", "lse", "q", "k", "v")
COARSE = testing.AttentionCase(
    "coarse", lambda c: attention.coarse(attention.causal(1), 3, 2), query_length=17
)
CASES = {case.name: case for case in [*testing.attention_cases(), COARSE]}
OFTEN = {
    "causal_offset_by_row",
    "window_both_sides",
    "prefix",
    "segments_cross",
    "local_global",
    "strided",
    "coarse",
    "explicit",
    "one_query",
    "one_key",
    "sinks_over_nothing",
    "everything_at_once",
    "bfloat16",
}


def kernels(x, d_out, d_lse, **how):
    """Values and gradients of the kernels, in the order of `NAMES`."""
    q, k, v, mask = map(x.get, ("q", "k", "v", "mask"))
    options = {n: x[n] for n in ("bias", "scale", "softcap", "sinks")}
    assert _flash_tpu.refuses(q, k, v, mask, **options) is None
    how = {"block_sizes": MANY_BLOCKS, "interpret": True} | how
    out, lse = _flash_tpu.forward(q, k, v, mask, **options, **how)
    given = (q, k, v, mask, out, lse, d_out, d_lse)
    return out, lse, *_flash_tpu.backward(*given, **options, **how)[:3]


def unfused(x, d_out, d_lse):
    """The same of dense attention, in the dtypes of its arguments."""

    def f(q, k, v):
        return dense.attend(**x | {"q": q, "k": k, "v": v}, return_lse=True)

    (out, lse), pull_back = jax.vjp(f, x["q"], x["k"], x["v"])
    return out, lse, *pull_back((d_out, d_lse.astype(lse.dtype)))


def meaning(x, d_out, d_lse):
    """The same in float32 of what was rounded."""
    wide = {n: x[n].astype(jnp.float32) for n in ("q", "k", "v", "bias") if x[n] is not None}
    return unfused(x | wide, d_out.astype(jnp.float32), d_lse)


def drawn(case, **changes):
    """The arguments of a case, and gradients of its results."""
    x = case.inputs()
    x |= {"scale": case.head_dim**-0.5 if case.scale is None else case.scale} | changes
    random = np.random.default_rng(1)
    shape = (case.batch, case.query_length, case.num_heads)
    d_out = jnp.asarray(random.standard_normal((*shape, case.value_dim)), case.dtype)
    return x, d_out, jnp.asarray(random.standard_normal(shape), jnp.float32)


def computed(functions, x, *gradients):
    """What functions make of them, compiled as one; numbers that are no arrays stay static."""
    static = {n: y for n, y in x.items() if isinstance(y, float)}
    arrays = {n: y for n, y in x.items() if n not in static}
    run = jax.jit(lambda x, *gradients: [f({**x, **static}, *gradients) for f in functions])
    return run(arrays, *gradients)


def assert_close(found, expected, dtype):
    """Within a rounding or two of the largest number; of the inputs, where the truth is zero."""
    rounding = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7, jnp.float16: 2**-10}[dtype]
    for name, one, other in zip(NAMES, found, expected, strict=True):
        one, other = np.float64(one), np.float64(other)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other), name)
        one, other = (np.where(np.isneginf(y), 0, y) for y in (one, other))
        bound = rounding * max(np.abs(other).max(), 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_values_and_gradients_are_those_of_dense_attention(name):
    case = CASES[name]
    found, expected = computed((kernels, meaning), *drawn(case))
    assert [x.dtype for x in found] == [case.dtype, jnp.float32, *[case.dtype] * 3]
    assert_close(found, expected, case.dtype)


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 60))]
)
def test_a_drawn_case_is_dense_attention(seed):
    case = testing.draw_attention_case(seed)
    found, expected = computed((kernels, meaning), *drawn(case))
    assert_close(found, expected, case.dtype)


def test_logits_of_ten_thousand_stay_finite_with_a_scale_that_is_traced():
    case = dataclasses.replace(CASES["causal_key_lengths"], batch=2, num_heads=1, num_kv_heads=1)
    found, expected = computed((kernels, meaning), *drawn(case, scale=jnp.array(-1e4)))
    assert all(np.isfinite(y).all() for n, y in zip(NAMES, found) if n != "lse")
    largest = np.abs(np.where(np.isneginf(expected[1]), 0, expected[1])).max()
    assert largest > 1e4
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=4 * 2**-24 * largest)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_errors_against_float64_are_at_most_a_quarter_above_those_of_dense_attention(dtype):
    case = testing.AttentionCase(
        "", lambda c: attention.causal(6), 1, 293, 307, 4, 2, 64, 64, dtype=dtype
    )
    cut = _flash_tpu.Cut(256, 256, 128, 128, 1)
    given = drawn(case)
    fused, plain = computed((functools.partial(kernels, block_sizes=cut), unfused), *given)
    with jax.enable_x64():
        exact = computed((unfused,), *jax.tree.map(lambda x: jnp.asarray(np.float64(x)), given))[0]
    for name, *values in zip(NAMES, fused, plain, exact, strict=True):
        one, other, truth = (np.asarray(x, np.float64) for x in values)
        unit = max(float(jnp.finfo(jnp.float32 if name == "lse" else dtype).eps), 2e-6)
        error, allowed = np.abs(one - truth).max(), 1.25 * np.abs(other - truth).max()
        assert error <= max(allowed, unit * np.abs(truth).max()), name
        assert np.linalg.norm(one - truth) <= 1.25 * np.linalg.norm(other - truth), name


def test_no_grid_step_races_another_or_reads_what_nobody_wrote():
    races = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    case = testing.AttentionCase("", lambda c: attention.causal(), 1, 19, 19, 2, 1, 16, 16)
    how = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    cut = _flash_tpu.Cut(16, 128, 16, 128, 1)

    def strict(*args):
        return kernels(*args, interpret=how, block_sizes=cut)

    found, expected = computed((strict, meaning), *drawn(case))
    assert_close(found, expected, case.dtype)
    assert not races.races.races_found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": np.zeros((3, 13, 5, 7))}, "k of float64"),
        ({n: jnp.zeros((3, 13, 5, 257)) for n in "qk"}, "H=257"),
        ({"v": jnp.zeros((3, 13, 5, 260))}, "Hv=260"),
        ({n: jnp.zeros((3, 0, 5, 7)) for n in "kv"}, "(3, 0, 5, 7)"),
        ({n: jax.ShapeDtypeStruct((1, 300000, 1, 8), jnp.float32) for n in "qkv"}, "have 343396"),
        ({"q": jnp.zeros((1, 1, 999, 7)), "k": jnp.zeros((1, 1, 1, 7))}, "N/K=999"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_number(change, reason):
    assert reason in _flash_tpu.refuses(**testing.AttentionCase("").inputs() | change)


def test_only_pairs_of_blocks_that_the_mask_leaves_count_against_the_limit():
    x = {n: jax.ShapeDtypeStruct((1, 300_000, 1, 8), jnp.float32) for n in "qkv"}
    x |= dict.fromkeys(("bias", "scale", "softcap", "sinks"))
    ids = jnp.zeros((1, 300_000), jnp.int32)
    near = attention.window(1000) & attention.segments(ids)
    assert _flash_tpu.refuses(**x, mask=near) is None
    assert "pairs" in str(_flash_tpu.refuses(**x, mask=attention.causal()))


def test_the_table_of_block_sizes_is_as_its_script_writes_it_and_cells_divide_blocks():
    script = pathlib.Path(__file__).parents[3] / "scripts/make_tpu_blocks.py"
    written = runpy.run_path(str(script))["text"]
    text = pathlib.Path(str(_tpu_blocks.__file__)).read_text()
    libtpu = text.partition("libtpu ")[2].partition(";")[0]
    assert written(_tpu_blocks.TABLE, libtpu) == text
    for cut in (
        _flash_tpu.Cut(*sizes) for chip in _tpu_blocks.TABLE.values() for sizes in chip.values()
    ):
        assert cut.query % cut.rows == cut.key % cut.columns == cut.columns % _flash_tpu.LANES == 0


def test_a_gradient_of_the_bias_is_refused():
    x: dict[str, Any] = CASES["bias"].inputs() | {"scale": 0.5}
    x |= {"out": x["q"], "d_out": x["q"], "lse": x["q"][..., 0], "d_lse": x["q"][..., 0]}
    with pytest.raises(NotImplementedError, match="bias"):
        _flash_tpu.backward(**x, bias_gradient=True)


PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.ops import attention
from jaxformer.ops.attention import _flash_tpu

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.asarray(chips), ("data",), axis_types=(AxisType.Auto,))


def both(q, bias, seen, traced):
    mask = attention.causal() if seen is None else attention.explicit(seen)
    options = {"bias": bias, "scale": traced, "softcap": None, "sinks": None}
    out, lse = _flash_tpu.forward(q, q, q, mask, **options)
    given = (q, q, q, mask, out, lse, out, lse)
    return _flash_tpu.backward(*given, **options)[:3]


like = jax.ShapeDtypeStruct
data, same = PartitionSpec("data"), PartitionSpec()
specs = (data, same, same, same)
for length, dtype, plain in ((300, "bfloat16", True), (13, "float16", False), (1, "float32", True)):
    q, square = like((4, length, 2, 64), dtype), (1, 1, length, length)
    extra = (None, None) if plain else (like(square, dtype), like(square, bool))
    placed = tuple(NamedSharding(mesh, spec) for spec in specs)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        f = jax.shard_map(both, in_specs=specs, out_specs=data)
        lowered = jax.jit(f, in_shardings=placed).lower(q, *extra, like((), "float32"))
    text = lowered.compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text
"""


def test_both_kernels_compile_for_a_slice_within_shard_map_also_where_little_is_to_do():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
