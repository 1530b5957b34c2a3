"""Sparse patterns cut into parts are the same attention, and cost n√n."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import blocks, sparse

CAUSAL = attention.causal()
FIXED, FIXED_TWO = attention.local_global(5), attention.local_global(5, 2)
STRIDED = attention.strided(5)
PATTERNS = {
    "fixed": FIXED,
    "fixed causal": FIXED_TWO & CAUSAL,
    "strided": STRIDED,
    "strided causal": CAUSAL & STRIDED,
}


def case(mask, length, **options):
    """Of two query heads to a key head."""
    sizes = {"batch": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 7, "value_dim": 11}
    sizes |= {"query_length": length, "key_length": length}
    return testing.AttentionCase("sparse", lambda _: mask, **sizes | options)


def without_bias(*, bias, **arguments):
    assert bias is None
    return sparse.attend(**arguments)


@pytest.mark.parametrize(
    ("length", "options"), [(20, {}), (23, {"sinks": True, "softcap": 2.0, "scale": 0.7})], ids=str
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_and_gradients_are_those_of_dense_attention(pattern, length, options):
    checked = case(PATTERNS[pattern], length, **options)
    testing.assert_attention(checked, without_bias, forward_mode=False)


@pytest.mark.parametrize("length", [3, 6])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sequences_of_hardly_a_block_are_no_exception(pattern, length):
    inputs = case(PATTERNS[pattern], length).inputs()
    found = without_bias(**inputs, return_lse=True)
    for one, other in zip(found, attention.attend(**inputs, return_lse=True), strict=True):
        np.testing.assert_allclose(one, other, atol=16 * np.finfo(np.float32).eps)


def test_no_tokens_give_none_back():
    inputs = case(FIXED, 0).inputs()
    assert sparse.attend(inputs["q"], inputs["k"], inputs["v"], FIXED).shape == (2, 0, 6, 11)


@pytest.mark.parametrize("pattern", PATTERNS)
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
        compiled = jax.jit(functools.partial(sparse.attend, mask=mask)).lower(shape, shape, shape)
        return compiled.compile().memory_analysis().temp_size_in_bytes  # type: ignore

    # Tiles are as large for both or less than four times larger; n√n would make it eight times.
    assert temporary(65536) < 4.5 * temporary(16384)


@pytest.mark.parametrize(
    ("mask", "split"),
    [
        (FIXED, (5, 1, False)),
        (FIXED_TWO & CAUSAL, (5, 2, True)),
        (CAUSAL & FIXED_TWO, (5, 2, True)),
        (STRIDED & CAUSAL, (5, 0, True)),
        (None, None),
        (CAUSAL, None),
        (CAUSAL & CAUSAL, None),
        (FIXED & STRIDED, None),
        (FIXED | CAUSAL, None),
        (attention.local_global(5, offset=2), None),
        (attention.strided(5, offset=2) & CAUSAL, None),
        (STRIDED & attention.causal(1), None),
        (STRIDED & attention.causal(jnp.array([0, 1])), None),
        (attention.window(3, 4) | sparse.masks.Stride(5, 0), None),
    ],
    ids=str,
)
def test_only_the_patterns_themselves_are_recognised(mask, split):
    assert sparse.splits(mask) == split


def test_what_cannot_be_cut_is_refused_by_name():
    inputs = case(FIXED, 13).inputs()
    q, k, v = (inputs[name] for name in "qkv")
    with pytest.raises(NotImplementedError, match=r"got And\(.*FirstKeys"):
        sparse.attend(q, k, v, FIXED & attention.key_lengths(jnp.array([3, 13])))
    with pytest.raises(NotImplementedError, match="got None"):
        sparse.attend(q, k, v, None)
    with pytest.raises(NotImplementedError, match="T=13, S=11"):
        sparse.attend(q, k[:, :11], v[:, :11], FIXED)
    with pytest.raises(ValueError, match="no implementation 'none'"):
        sparse.attend(q, k, v, FIXED, implementation="none")
