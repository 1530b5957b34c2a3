"""Decoding with a cache is attention of the last positions, whatever the split and the lengths."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxformer.ops import attention
from jaxformer.ops.attention import _xla_tiles, decode, flash

EPS = float(jnp.finfo(jnp.float32).eps)
B, T, S, N, K, H, HV = 3, 2, 13, 4, 2, 5, 7


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(t=T, s=S, dtype=jnp.float32):
    return (
        draw(B, t, N, H, seed=1, dtype=dtype),
        draw(B, s, K, H, seed=2, dtype=dtype),
        draw(B, s, K, HV, seed=3, dtype=dtype),
    )


def expected(q, k, v, lengths, window=None, **options):
    mask = attention.window(window, 0, lengths - q.shape[1]) & attention.key_lengths(lengths)
    return attention.attend(q, k, v, mask, **options, return_lse=True)


def total(f, arrays, lengths, **options):
    out, lse = f(*arrays, lengths, **options)
    weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return (out * weights).sum() + jnp.sin(jnp.where(lse == -jnp.inf, 0, lse)).sum(), (out, lse)


def assert_same(arrays, lengths, extra=None, **options):
    """Outputs, logarithmic sums and all gradients; some 10 terms of about 1 err a few eps each."""

    def compared(f, **more):
        def scalar(arrays, extra):
            return total(f, arrays, lengths, **options, **more, **extra)

        f_and_gradients = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
        (_, outputs), gradients = f_and_gradients(arrays, extra or {})
        return jax.tree.leaves((outputs, gradients))

    splits = options.pop("splits", None)
    found = compared(decode.attend, splits=splits, return_lse=True)
    for one, other in zip(found, compared(expected), strict=True):
        assert one.dtype == other.dtype
        finite = np.where(np.isinf(other), 0, other)
        np.testing.assert_allclose(one, other, atol=64 * EPS * max(np.abs(finite).max(), 1))


OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
    "sinks": {"sinks": draw(N, seed=4)},
    "bias": {"bias": draw(N, 1, S, seed=5)},
    "bias of a row": {"bias": draw(B, 1, T, 1, seed=5), "sinks": draw(N, seed=6)},
}


@pytest.mark.parametrize(("splits", "block"), [(None, 4), (3, 4), (S, 512)])
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_those_of_attention(name, splits, block, monkeypatch):
    monkeypatch.setattr(_xla_tiles, "BLOCK", block)
    options = dict(OPTIONS[name])
    extra = {n: options.pop(n) for n in ("bias", "sinks") if n in options}
    assert_same(arguments(), jnp.array([0, 8, S]), extra, splits=splits, **options)


@pytest.mark.parametrize("lengths", [[1, 5, 4], [0, 0, 0], [1, 2, 3]])
def test_one_query_and_lengths_at_the_edges_of_blocks(lengths, monkeypatch):
    monkeypatch.setattr(_xla_tiles, "BLOCK", 4)
    assert_same(arguments(t=1, s=8), jnp.array(lengths))


def test_more_queries_than_keys_in_use_give_zeros():
    q, k, v = arguments(t=5)
    out, lse = decode.attend(q, k, v, jnp.array([0, 2, 3]), return_lse=True)
    assert (out[0] == 0).all()
    assert (out[1, :3] == 0).all()
    assert (lse[2, :2] == -jnp.inf).all()
    assert (out[1, 3:] != 0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_narrow_numbers_lose_no_more_than_a_rounding_of_each_part(splits):
    q, k, v = arguments(dtype=jnp.bfloat16)
    lengths = jnp.array([13, 8, 5])
    out = decode.attend(q, k, v, lengths, splits=splits)
    assert out.dtype == jnp.bfloat16
    exact, _ = expected(*(x.astype(jnp.float32) for x in (q, k, v)), lengths)
    # Weights, parts and the result are each rounded by half an eps of what is at most max|v|.
    atol = 1.5 * float(jnp.finfo(jnp.bfloat16).eps) * float(jnp.abs(v).max())
    np.testing.assert_allclose(np.float32(out), exact, atol=atol)


def test_stale_keys_beyond_the_length_have_no_influence(monkeypatch):
    monkeypatch.setattr(_xla_tiles, "BLOCK", 4)
    q, k, v = arguments()
    lengths = jnp.array([2, 7, 11])
    stale = (jnp.arange(S)[None] >= lengths[:, None])[..., None, None]
    clean = decode.attend(q, k, v, lengths)
    found = decode.attend(q, jnp.where(stale, 1e4, k), jnp.where(stale, -1e4, v), lengths)
    np.testing.assert_array_equal(found, clean)


def test_blocks_that_no_row_has_reached_are_not_read(monkeypatch):
    monkeypatch.setattr(_xla_tiles, "BLOCK", 4)
    q, k, v = arguments()
    lengths = jnp.array([2, 7, 6])
    unread = (jnp.arange(S) >= 7)[None, :, None, None]
    clean = decode.attend(q, k, v, lengths)
    k, v = (jnp.where(unread, jnp.nan, x) for x in (k, v))
    np.testing.assert_array_equal(decode.attend(q, k, v, lengths), clean)


def test_new_lengths_do_not_recompile():
    f = jax.jit(chex.assert_max_traces(lambda *x: decode.attend(*x, window=5), 1))
    q, k, v = arguments()
    for lengths in ([0, 1, 2], [13, 12, 11]):
        lengths = jnp.array(lengths)
        out, _ = expected(q, k, v, lengths, window=5)
        np.testing.assert_allclose(f(q, k, v, lengths), out, atol=64 * EPS)


def test_a_text_decoded_by_tokens_is_the_text_at_once():
    q, k, v = arguments(t=S)
    step = jax.jit(decode.attend)
    found = [step(q[:, t : t + 1], k, v, jnp.full(B, t + 1)) for t in range(S)]
    whole = attention.attend(q, k, v, attention.causal())
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=64 * EPS)


def test_vmap_maps_caches():
    q, k, v = arguments(t=1)
    lengths = jnp.array([4, 0, 9])
    mapped = jax.vmap(lambda q, k, v, n: decode.attend(q[None], k[None], v[None], n[None])[0])
    found = mapped(q, k, v, lengths)
    np.testing.assert_allclose(found, expected(q, k, v, lengths)[0], atol=64 * EPS)


def test_devices_hold_caches_of_their_own(monkeypatch):
    monkeypatch.setattr(_xla_tiles, "BLOCK", 4)
    mesh = jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    q, k, v = arguments()
    lengths = jnp.array([4, 0, 13])
    spec = PartitionSpec("data")
    found = jax.jit(jax.shard_map(decode.attend, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))
    np.testing.assert_allclose(
        found(q, k, v, lengths), expected(q, k, v, lengths)[0], atol=64 * EPS
    )


def test_splits_are_one_on_cpu_and_fill_a_gpu(monkeypatch):
    assert decode._splits(1, 1 << 17, 8) == 1
    monkeypatch.setattr(flash, "platform", lambda: "gpu")
    assert decode._splits(1, 1 << 17, 8) == 16
    assert decode._splits(128, 1 << 17, 8) == 1
    assert decode._splits(1, 4099, 8) == 1
    assert decode._splits(1, 2 * decode.BLOCK, 1) == 2


def test_mistakes_are_named():
    q, k, v = arguments()
    with pytest.raises((ValueError, TypeError), match="lengths"):
        decode.attend(q, k, v, jnp.zeros(2, jnp.int32))
    for splits in (0, S + 1):
        with pytest.raises(ValueError, match="splits"):
            decode.attend(q, k, v, jnp.zeros(B, jnp.int32), splits=splits)
    with pytest.raises((ValueError, TypeError), match="sinks"):
        decode.attend(q, k, v, jnp.zeros(B, jnp.int32), sinks=jnp.zeros(N + 1))
    with pytest.raises(ValueError, match="nonsense"):
        decode.attend(q, k, v, jnp.zeros(B, jnp.int32), implementation="nonsense")
