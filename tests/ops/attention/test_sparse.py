"""Sparse patterns computed in parts are the same attention, and cost n√n."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import blocks, flash, sparse

CAUSAL = attention.causal()
FIXED, FIXED_TWO = attention.local_global(5), attention.local_global(5, 2)
STRIDED = attention.strided(5)
LENGTHS = attention.key_lengths(jnp.array([0, 17]))
PATTERNS = {
    "fixed": FIXED,
    "fixed causal": FIXED_TWO & CAUSAL,
    "strided": STRIDED,
    "strided causal": CAUSAL & STRIDED,
    "fixed lengths": LENGTHS & FIXED_TWO,
    "strided causal lengths": STRIDED & CAUSAL & LENGTHS,
}
in_parts = functools.partial(flash.attend, split=True)


def case(mask, length, **options):
    """Of two query heads to a key head."""
    sizes = {"batch": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 7, "value_dim": 11}
    sizes |= {"query_length": length, "key_length": length}
    return testing.AttentionCase("sparse", lambda _: mask, **sizes | options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_and_derivatives_are_those_of_dense_attention(pattern):
    whole_blocks = pattern in ("fixed causal", "strided", "fixed lengths")
    options = {} if "causal" in pattern else {"sinks": True, "softcap": 2.0, "scale": 0.7}
    checked = case(PATTERNS[pattern], 20 if whole_blocks else 23, **options)
    testing.assert_attention(checked, in_parts, forward_mode=whole_blocks)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("fixed causal", jnp.bfloat16),
        ("strided causal lengths", jnp.float16),
    ],
)
def test_parts_in_narrow_numbers_are_as_exact_as_the_whole_must_be(pattern, dtype):
    narrow = case(PATTERNS[pattern], 61, dtype=dtype)
    testing.assert_attention(narrow, in_parts, forward_mode=False)


@pytest.mark.parametrize("length", [3, 6])
@pytest.mark.parametrize("pattern", ["fixed", "strided", "strided causal lengths"])
def test_sequences_of_hardly_a_block_are_no_exception(pattern, length):
    inputs = case(PATTERNS[pattern], length).inputs()
    found = in_parts(**inputs, return_lse=True)
    for one, other in zip(found, attention.attend(**inputs, return_lse=True), strict=True):
        np.testing.assert_allclose(one, other, atol=16 * np.finfo(np.float32).eps)


def test_no_tokens_give_none_back():
    inputs = case(FIXED, 0).inputs()
    assert in_parts(inputs["q"], inputs["k"], inputs["v"], FIXED).shape == (2, 0, 6, 11)


def gradients(attend, inputs, arrays):
    """Of a scalar that depends on each output; and the scalar."""

    def total(arrays):
        out, lse = attend(**inputs | arrays, return_lse=True)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * weights).sum() + jnp.sin(jnp.where(jnp.isinf(lse), 0, lse)).sum()

    return jax.value_and_grad(total)(arrays)


def assert_close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(np.abs(other).max(), 1e-2)
        np.testing.assert_allclose(one, other, atol=64 * np.finfo(np.float32).eps * size)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [(FIXED, "qkv"), (FIXED_TWO, ("k", "sinks")), (STRIDED & CAUSAL, ("q", "lengths"))],
    ids=str,
)
def test_a_mapped_axis_gives_what_one_call_each_gives(pattern, names):
    inputs = case(pattern, 23, sinks=True).inputs()
    arrays = {n: inputs[n] for n in ("q", "k", "v", "sinks")}
    lengths = jnp.array([[7, 23], [0, 11], [20, 1]])

    def call(attend, mapped, i):
        mask = pattern & attention.key_lengths(lengths[i if "lengths" in names else 0])
        return gradients(attend, inputs | {"mask": mask}, arrays | mapped)

    mapped = {n: jnp.stack([arrays[n], -arrays[n], 2 * arrays[n]]) for n in names if n in arrays}
    number = jnp.arange(3)

    @jax.jit
    def both(*inputs):
        return [jax.vmap(functools.partial(call, f))(*inputs) for f in (in_parts, attention.attend)]

    assert_close(*both(mapped, number))


@pytest.mark.parametrize(
    ("pattern", "spec"),
    [("fixed", (None, None, "heads")), ("strided causal lengths", ("data", None, "heads"))],
)
def test_each_device_attends_to_its_own_under_shard_map(pattern, spec):
    mesh = jax.make_mesh((2, 3), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs = case(PATTERNS[pattern], 23).inputs()
    arrays = {n: inputs[n] for n in "qkv"}
    P = PartitionSpec(*spec)
    row = PartitionSpec("data") if "data" in spec else PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P, row), out_specs=(P, P))
    def local(arrays, mask):
        return in_parts(**arrays, mask=mask, return_lse=True)

    def attend(q, k, v, mask, return_lse, **_):
        return local({"q": q, "k": k, "v": v}, mask)

    @jax.jit
    def both(arrays):
        return [gradients(f, inputs, arrays) for f in (attend, attention.attend)]

    assert_close(*both(arrays))


def test_the_second_derivative_is_that_of_dense_attention():
    inputs = case(PATTERNS["fixed lengths"], 13).inputs()
    arrays = {n: inputs[n] for n in "qv"}

    def product(attend):
        slope = functools.partial(gradients, attend, inputs)
        return jax.jvp(slope, (arrays,), (jax.tree.map(jnp.cos, arrays),))

    assert_close(*jax.jit(lambda: (product(in_parts), product(attention.attend)))())


@pytest.mark.parametrize(
    ("mask", "length", "platform", "expected"),
    [
        (attention.local_global(16) & CAUSAL, 256, "cpu", True),
        (attention.local_global(16) & CAUSAL, 256, "tpu", False),
        (attention.local_global(128) & CAUSAL & LENGTHS, 16384, "tpu", True),
        (attention.strided(64), 4096, "gpu", True),
        (attention.strided(256) & CAUSAL, 512, "cpu", False),
        (attention.local_global(300), 256, "cpu", False),
    ],
    ids=str,
)
def test_parts_are_taken_where_they_count_as_less_work(mask, length, platform, expected):
    assert sparse.pays(mask, length, platform) == expected


def test_the_door_splits_by_itself_and_says_so():
    mask = attention.local_global(16) & CAUSAL & attention.key_lengths(jnp.array([31, 256]))
    inputs = case(mask, 256).inputs()
    assert str(flash.choose(**inputs)) == "xla in parts"
    both = [functools.partial(f, return_lse=True) for f in (flash.attend, attention.attend)]
    assert_close(*jax.jit(lambda: [f(**inputs) for f in both])())
    q, k, v = (inputs[name] for name in "qkv")
    for other in (
        {"bias": jnp.zeros(256)},
        {"implementation": "xla"},
        {"split": False},
        {"mask": mask & FIXED},
        {"k": k[:, :255], "v": v[:, :255]},
    ):
        assert not flash.choose(**{"q": q, "k": k, "v": v, "mask": mask} | other).split
    assert flash.choose(q, k, v, mask, implementation="xla", split=True).split


def test_an_implementation_is_asked_about_the_parts(monkeypatch):
    asked = []
    monkeypatch.setattr(flash, "platform", lambda: "tpu")
    monkeypatch.setattr(
        flash, "_refusal", lambda name, q, k, v, mask, options: asked.append((q.shape, k.shape))
    )
    x = jax.ShapeDtypeStruct((3, 16384, 2, 128), jnp.bfloat16)
    assert flash.choose(x, x, x, attention.local_global(128) & CAUSAL).split
    assert asked == [((384, 128, 2, 128),) * 2, ((3, 16384, 2, 128), (3, 127, 2, 128))]


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if "lengths" not in name])
def test_tiles_of_one_pair_count_the_pairs_of_the_mask_once_each(pattern):
    mask, length, head_dim = PATTERNS[pattern], 35, 7
    pairs = int(mask.dense(length, length).sum())
    assert sparse.flops(mask, length, head_dim, block=1) == 4 * head_dim * pairs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "make", [attention.local_global, attention.strided, lambda n: attention.local_global(n, 2)]
)
def test_the_count_grows_with_the_power_three_halves(make, causal):
    lengths = 4.0 ** np.arange(5, 9)  # 1,024 to 65,536
    counts = []
    for length in map(int, lengths):
        pattern = make(int(length**0.5))
        counts.append(sparse.flops(pattern & CAUSAL if causal else pattern, length, 64))
    steps = np.diff(np.log(counts)) / np.diff(np.log(lengths))
    np.testing.assert_allclose(steps, 1.5, atol=0.05)


def test_without_the_cut_tiles_would_make_it_quadratic():
    for length in (4096, 16384):
        mask = attention.local_global(int(length**0.5))
        assert (blocks.kinds(mask, length, length, 512, 512) != blocks.SKIP).all()


def test_what_does_not_split_is_counted_as_flash_attention():
    assert sparse.flops(None, 1024, 7) == 4 * 7 * 1024**2
    assert sparse.flops(CAUSAL, 1024, 7) == 4 * 7 * 3 * 512**2


def test_the_memory_of_the_compiled_program_is_linear_in_the_length():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        mask = attention.local_global(int(length**0.5)) & CAUSAL
        grads = jax.grad(lambda *x: flash.attend(*x, mask).sum(), argnums=(0, 1, 2))
        compiled = jax.jit(grads).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # type: ignore

    # Tiles are as large for both or less than four times larger; n√n would make it eight times.
    assert temporary(65536) < 4.5 * temporary(16384)


@pytest.mark.parametrize(
    ("mask", "split"),
    [
        (FIXED, (5, 1, False)),
        (FIXED_TWO & CAUSAL, (5, 2, True)),
        (CAUSAL & (FIXED_TWO & CAUSAL), (5, 2, True)),
        (LENGTHS & STRIDED & CAUSAL, (5, 0, True)),
        (None, None),
        (CAUSAL, None),
        (CAUSAL & CAUSAL, None),
        (CAUSAL & LENGTHS, None),
        (FIXED & STRIDED, None),
        (FIXED | CAUSAL, None),
        (FIXED | LENGTHS, None),
        (attention.local_global(5, offset=2), None),
        (attention.strided(5, offset=2) & CAUSAL, None),
        (STRIDED & attention.causal(1), None),
        (STRIDED & attention.causal(jnp.array([0, 1])), None),
        (STRIDED & attention.segments(jnp.zeros((2, 13), int)), None),
        (attention.window(3, 4) | sparse.masks.Stride(5, 0), None),
    ],
    ids=str,
)
def test_only_the_patterns_themselves_are_recognised(mask, split):
    found = sparse.splits(mask)
    assert (found and found[:3]) == split


def test_what_has_no_parts_is_refused_by_name():
    inputs = case(FIXED, 13).inputs()
    q, k, v = (inputs[name] for name in "qkv")
    with pytest.raises(NotImplementedError, match="only local_global and strided"):
        in_parts(q, k, v, FIXED & FIXED)
    with pytest.raises(NotImplementedError, match="T=13, S=11"):
        in_parts(q, k[:, :11], v[:, :11], FIXED)
    with pytest.raises(NotImplementedError, match="no bias"):
        in_parts(q, k, v, FIXED, bias=jnp.zeros(13))
    with pytest.raises(NotImplementedError, match="dense has none"):
        in_parts(q, k, v, FIXED, implementation="dense")
    with pytest.raises(NotImplementedError, match="'tpu' cannot: it needs a TPU"):
        in_parts(q, k, v, FIXED, implementation="tpu")
    with pytest.raises(ValueError, match="no implementation 'none'"):
        in_parts(q, k, v, FIXED, implementation="none")
    with pytest.raises(ValueError, match="mask has B=3, the attention has B=2"):
        in_parts(q, k, v, FIXED & attention.key_lengths(jnp.array([1, 2, 3])))
