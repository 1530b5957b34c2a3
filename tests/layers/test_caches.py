"""Caches by row and caches that roll: what they hold, forget and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import KVCache, SelfAttention
from jaxformer.ops import attention

B, K, H = 2, 1, 3


def numbers(count, seed=0):
    shape = (B, count, K, H)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_rows_grow_each_by_itself_and_padding_leaves_no_trace():
    cache, x = KVCache.empty(B, K, 6, H, by_row=True), numbers(4)
    cache = cache.append(x, 2 * x, jnp.array([4, 1]))
    np.testing.assert_array_equal(cache.length, [4, 1])
    y = numbers(2, 1)
    cache = cache.append(y, 2 * y)
    np.testing.assert_array_equal(cache.keys[0, 0], jnp.concatenate([x[0, :, 0], y[0, :, 0]]))
    np.testing.assert_array_equal(cache.keys[1, 0, :3], jnp.concatenate([x[1, :1, 0], y[1, :, 0]]))
    np.testing.assert_array_equal(cache.values, 2 * cache.keys)


def test_a_row_that_is_too_long_is_nan_and_the_other_is_not():
    cache, x = KVCache.empty(B, K, 4, H, by_row=True), numbers(3)
    cache = cache.append(x, x, jnp.array([3, 1])).append(x, x, jnp.array([3, 3]))
    assert np.isnan(cache.keys[0]).any()
    assert not np.isnan(cache.keys[1]).any()


@pytest.mark.parametrize("counts", [None, [5, 2], [1, 5]])
def test_a_rolling_cache_holds_the_last_places(counts):
    cache, whole = KVCache.empty(B, K, 4, H, by_row=True), [[], []]
    for seed in range(4):
        x = numbers(5, seed)
        given = None if counts is None else jnp.asarray(counts)
        cache = cache.slide(x, x, given)
        for row in range(B):
            whole[row] += list(np.asarray(x[row, : 5 if counts is None else counts[row], 0]))
    places = np.asarray(cache.places())
    for row in range(B):
        count = len(whole[row])
        assert sorted(places[row]) == list(range(count - 4, count))
        for index, place in enumerate(places[row]):
            np.testing.assert_array_equal(cache.keys[row, 0, index], whole[row][place])


def test_nothing_is_held_of_places_before_the_first():
    cache = KVCache.empty(B, K, 4, H, by_row=True).slide(numbers(2), numbers(2))
    assert (np.asarray(cache.places()) < 0).sum() == 2 * B


@pytest.mark.parametrize("room", [3, 5, 20])
def test_a_window_sees_the_same_with_its_cache(room):
    layer = SelfAttention(2, 1, 4, window=3, sinks=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 9, 8)), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    whole = layer.apply(params, x)
    cache = KVCache.empty(B, 1, room, 4, by_row=True)
    first, cache = layer.apply(params, x[:, :5], cache=cache, counts=jnp.array([5, 2]))
    np.testing.assert_allclose(first[0], whole[0, :5], atol=1e-5)
    np.testing.assert_allclose(first[1, :2], whole[1, :2], atol=1e-5)
    for _ in range(4):
        places = np.asarray(cache.length)
        new = x[np.arange(B), places][:, None]
        y, cache = layer.apply(params, new, cache=cache)
        np.testing.assert_allclose(y[:, 0], whole[np.arange(B), places], atol=1e-5)


@pytest.mark.parametrize("room", [3, 5, 20])
def test_padding_that_is_nan_spoils_no_real_token(room):
    layer = SelfAttention(2, 1, 4, window=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 7, 8)), jnp.float32)
    params, counts = layer.init(jax.random.key(0), x), jnp.array([7, 2])
    padded = jnp.where((jnp.arange(7)[None] < counts[:, None])[..., None], x, jnp.nan)
    cache = KVCache.empty(B, 1, room, 4, by_row=True)
    found, after = layer.apply(params, padded, cache=cache, counts=counts)
    whole = layer.apply(params, x)
    np.testing.assert_allclose(found[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(found[1, :2], whole[1, :2], atol=1e-5)
    assert np.isfinite(after.keys).all()
    assert np.isfinite(after.values).all()


@pytest.mark.parametrize(("room", "by_row"), [(3, False), (5, True)])
@pytest.mark.parametrize(
    "mask",
    [
        attention.explicit(jnp.asarray(np.random.default_rng(1).random((B, 1, 1, 9)) > 0.4)),
        attention.key_lengths(jnp.array([6, 3])),
    ],
    ids=["explicit", "lengths"],
)
def test_a_mask_narrows_what_a_window_sees_with_its_cache(mask, room, by_row):
    layer = SelfAttention(2, 1, 4, window=3, sinks=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 9, 8)), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    whole = layer.apply(params, x, attention.causal() & mask)
    assert not np.allclose(whole, layer.apply(params, x), atol=1e-2)
    cache, found = KVCache.empty(B, 1, room, 4, by_row=by_row), []
    for part in jnp.split(x, [4, 5, 6, 8], axis=1):
        y, cache = layer.apply(params, part, mask, cache=cache)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-5)


def test_a_cache_smaller_than_its_window_does_not_roll_but_is_nan_past_its_end():
    layer = SelfAttention(2, 1, 4, window=5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 6, 8)), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    first, cache = layer.apply(params, x[:, :4], cache=KVCache.empty(B, 1, 4, 4, by_row=True))
    np.testing.assert_allclose(first, layer.apply(params, x)[:, :4], atol=1e-5)
    more, _ = layer.apply(params, x[:, 4:], cache=cache, counts=jnp.array([1, 0]))
    assert np.isnan(more[0]).all()
    assert not np.isnan(more[1]).any()


def test_a_window_goes_with_no_slopes_and_with_a_cache_with_no_ahead_or_bias():
    x = jnp.zeros((B, 2, 8))
    with pytest.raises(ValueError, match="window"):
        SelfAttention(2, window=2, slopes=(0.5, 0.1)).init(jax.random.key(0), x)
    ahead = SelfAttention(2, window=2, ahead=1)
    params = ahead.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="window"):
        ahead.apply(params, x, cache=KVCache.empty(B, 2, 4, 4, by_row=True))
    with pytest.raises(ValueError, match="bias"):
        ahead.copy(ahead=0).apply(
            params, x, bias=jnp.zeros((1, 2, 2, 4)), cache=KVCache.empty(B, 2, 4, 4, by_row=True)
        )
