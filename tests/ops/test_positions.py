"""Added positions against the papers' formulas and the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import positions


def test_sinusoids_are_the_printed_formula():
    at = np.array([[0, 1, 2], [9, 40, 500], [1023, 3999, 4096]])
    table = positions.sinusoidal(jnp.asarray(at), 10)
    halves = positions.sinusoidal(jnp.asarray(at), 10, halves=True)
    for pair in range(5):
        angle = at / 10_000 ** (2 * pair / 10)
        for found in (table[..., 2 * pair], halves[..., pair]):
            np.testing.assert_allclose(found, np.sin(angle), atol=4e-7)
        for found in (table[..., 2 * pair + 1], halves[..., 5 + pair]):
            np.testing.assert_allclose(found, np.cos(angle), atol=4e-7)


def test_sinusoids_of_a_distance_are_a_rotation():
    table = np.float64(positions.sinusoidal(jnp.arange(60), 6))
    products = table @ table.T
    for distance in (1, 17):
        np.testing.assert_allclose(np.diag(products, distance), products[0, distance], atol=2e-5)


def test_sinusoids_are_rounded_once():
    at = jnp.array([1001, 1002])
    narrow = positions.sinusoidal(at, 6, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), positions.sinusoidal(at, 6), atol=2**-9)


BUCKETS = jax.jit(
    positions.t5_buckets,
    static_argnums=(0, 1),
    static_argnames=("num_buckets", "max_distance", "bidirectional"),
)
TABLE = jnp.arange(22.0).reshape(11, 2)


def test_lookup_takes_rows_from_an_offset_on():
    assert (positions.lookup(TABLE, 3, 5) == TABLE[5:8]).all()
    assert (jax.jit(positions.lookup, static_argnums=1)(TABLE, 3, 5) == TABLE[5:8]).all()
    gradient = jax.grad(lambda table: positions.lookup(table, 2, 8).sum())(TABLE)
    assert gradient.sum(axis=1).tolist() == [0.0] * 8 + [2.0, 2.0, 0.0]


@pytest.mark.parametrize(("length", "offset"), [(12, 0), (3, 9), (3, -1)])
def test_positions_that_the_table_lacks_are_refused_or_nan(length, offset):
    with pytest.raises(ValueError, match="table of 11 rows"):
        positions.lookup(TABLE, length, offset)
    traced = jax.jit(positions.lookup, static_argnums=1)(TABLE, length, offset)
    missing = (np.arange(length) + offset < 0) | (np.arange(length) + offset > 10)
    assert missing.any()
    assert (np.isnan(traced).all(axis=-1) == missing).all()


def test_slopes_are_those_of_the_paper():
    assert positions.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(
        positions.alibi_slopes(16), 2 ** (-0.5 * np.arange(1, 17)), rtol=1e-6
    )
    # BLOOM's published list for 12 heads: eight of 8, then every other one of 16.
    np.testing.assert_allclose(
        positions.alibi_slopes(12)[8:], 2 ** -np.array([0.5, 1.5, 2.5, 3.5]), rtol=1e-6
    )
    assert positions.alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize("num_heads", [3, 6, 12, 20])
def test_slopes_agree_with_transformers(num_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch = pytest.importorskip("torch")
    # At the second of two positions the bias of BLOOM is the slope itself.
    bias = bloom.build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)
    np.testing.assert_allclose(positions.alibi_slopes(num_heads), bias[:, 0, 1], rtol=1e-6)


def test_the_alibi_bias_falls_with_distance():
    bias = positions.alibi_bias(jnp.array([1.0, 0.5]), 2, 4, offset=1)
    assert bias.shape == (1, 2, 2, 4)
    assert bias[0, 0].tolist() == [[-1, 0, -1, -2], [-2, -1, 0, -1]]
    assert (bias[0, 1] == 0.5 * bias[0, 0]).all()
    with pytest.raises(ValueError, match="N=0"):
        positions.alibi_slopes(0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (14, 50)])
def test_buckets_agree_with_transformers(bidirectional, num_buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    torch = pytest.importorskip("torch")
    found = BUCKETS(
        1,
        601,
        offset=300,
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    expected = t5._relative_position_bucket(
        torch.arange(601)[None] - 300, bidirectional, num_buckets, max_distance
    )
    assert (np.asarray(found) == expected.numpy()).all()


def test_buckets_are_exact_when_near_and_shared_when_far():
    behind = np.asarray(BUCKETS(1, 401, offset=400, bidirectional=False))[0, ::-1]
    assert behind[:16].tolist() == list(range(16))
    assert (np.diff(behind) >= 0).all()
    assert (behind[128:] == 31).all()
    assert behind[100] < 31
    ahead = np.asarray(BUCKETS(3, 3, bidirectional=False))
    assert ahead.tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]
    both = np.asarray(BUCKETS(3, 3))
    assert both.tolist() == [[0, 17, 18], [1, 0, 17], [2, 1, 0]]


def test_buckets_depend_only_on_distance_with_a_traced_offset_too():
    assert (BUCKETS(3, 9, offset=4) == BUCKETS(7, 9)[4:]).all()


def test_a_bias_is_looked_up_head_by_head():
    table = jnp.arange(8.0).reshape(4, 2)
    bias = positions.bucket_bias(table, jnp.array([[0, 3, 1], [2, 4, -1]]))
    assert bias.shape == (1, 2, 2, 3)
    np.testing.assert_array_equal(bias[0, 1], [[1, 7, 3], [5, np.nan, np.nan]])


@pytest.mark.parametrize(
    "options",
    [{"num_buckets": 3}, {"num_buckets": 2}, {"max_distance": 8}, {"num_buckets": 33}],
)
def test_buckets_that_cannot_be_divided_are_refused(options):
    with pytest.raises(ValueError, match="cannot divide"):
        positions.t5_buckets(2, 2, **options)


def test_odd_widths_are_named_in_the_error():
    with pytest.raises(ValueError, match="D=7"):
        positions.sinusoidal(jnp.arange(3), 7)


def test_waves_of_a_grid_tell_the_last_axis_in_the_first_share():
    at = np.array([[0, 0], [3, 11], [25, 4]], np.float32)
    found = positions.sinusoidal_grid(jnp.asarray(at), 12)
    for axis, first in ((1, 0), (0, 6)):
        for wave in range(3):
            angle = at[:, axis] / 10_000 ** (wave / 3)
            np.testing.assert_allclose(found[:, first + wave], np.sin(angle), atol=3e-6)
            np.testing.assert_allclose(found[:, first + 3 + wave], np.cos(angle), atol=3e-6)
    with pytest.raises(ValueError, match="D=10, A=2"):
        positions.sinusoidal_grid(jnp.asarray(at), 10)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [(5, 7), (7, 11), (2, 3), (1, 20)])
def test_a_table_is_resized_as_pytorch_resizes_it(new, antialias):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((35, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table.reshape(1, 5, 7, 3).transpose(0, 3, 1, 2)),
        size=new,
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )
    found = positions.resize_grid(jnp.asarray(table), (5, 7), new, antialias=antialias)
    expected = theirs.numpy()[0].transpose(1, 2, 0).reshape(-1, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_resizing_keeps_a_slope_and_the_same_grid():
    table = jnp.asarray(np.indices((8, 4, 6)).reshape(3, -1).T, jnp.float32)
    assert positions.resize_grid(table, (8, 4, 6), (8, 4, 6)) is table
    twice = positions.resize_grid(table, (8, 4, 6), (16, 8, 12), antialias=True)
    middle = (slice(4, -4), slice(3, -3), slice(4, -4))  # where no edge is in reach
    expected = (np.indices((16, 8, 12)).transpose(1, 2, 3, 0) - 0.5) / 2
    found = np.asarray(twice).reshape(16, 8, 12, 3)
    np.testing.assert_allclose(found[middle], expected[middle], atol=1e-5)
    for wrong in ((5, 7), (4, 2, 4)):
        with pytest.raises(ValueError, match="192 rows"):
            positions.resize_grid(table, wrong, wrong)
