"""The forms of linear attention are one function, that of a formula in NumPy, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from jaxformer import testing
from jaxformer.layers.attention import SelfAttention
from jaxformer.ops import attention
from jaxformer.ops.attention import linear
from jaxformer.ops.attention.linear import State

B, T, N, K, H, HV, F = 2, 13, 6, 3, 5, 7, 11
EPS = float(jnp.finfo(jnp.float32).eps)
RANDOM = linear.positive_random_features(jax.random.key(3), H, F)
MAPS = {
    "elu_plus_one": linear.elu_plus_one,
    "relu": linear.relu,
    "taylor": linear.taylor,
    "random": RANDOM,
}
FORMS = ("chunked", "parallel", "recurrent")


def inputs(seed=0, length=T, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def some_state(num_features=H, seed=5):
    """The state of 17 keys, as `attend` would leave it behind."""
    random = np.random.default_rng(seed)
    keys = random.random((B, 17, K, num_features))
    values = random.standard_normal((B, 17, K, HV))
    matrix = np.einsum("bskf,bskh->bkfh", keys, values)
    return State(jnp.asarray(matrix, jnp.float32), jnp.asarray(keys.sum(1), jnp.float32))


def formula(q, k, v, queries, keys, causal=True, lengths=None, state=None):
    """One query at a time, in float64; the features are given, since they are tested elsewhere."""
    queries, keys, v = (np.asarray(x, np.float64) for x in (queries, keys, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        at = n // (q.shape[2] // k.shape[2])
        end = min(t + 1 if causal else k.shape[1], k.shape[1] if lengths is None else lengths[b])
        weights = keys[b, :end, at] @ queries[b, t, n]
        above, below = weights @ v[b, :end, at], weights.sum()
        if state is not None:
            above = above + queries[b, t, n] @ np.asarray(state.matrix, np.float64)[b, at]
            below = below + queries[b, t, n] @ np.asarray(state.total, np.float64)[b, at]
        out[b, t, n] = above / below if below else 0
    return out


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_formula(form, name):
    q, k, v = inputs()
    maps = linear._pair(MAPS[name])
    queries, keys = maps.queries(q), maps.keys(k)
    lengths = jnp.array([9, 13])
    state = some_state(keys.shape[-1])
    attend = jax.jit(functools.partial(linear.attend, feature_map=MAPS[name], implementation=form))
    scale = 64 * EPS * np.abs(v).max()
    if name == "random":  # the state of other keys is not on the scale of these features
        state = State(state.matrix * keys.max(), state.total * keys.max())
    y = attend(q, k, v, key_lengths=lengths, state=state)
    expected = formula(q, k, v, queries, keys, lengths=lengths, state=state)
    np.testing.assert_allclose(y, expected, atol=scale)


@pytest.mark.parametrize("form", ["chunked", "parallel"])
def test_without_causality_every_query_sees_all_keys_and_their_number_may_differ(form):
    q, (_, k, v) = inputs()[0], inputs(1, length=17)
    y, state = linear.attend(q, k, v, causal=False, implementation=form, return_state=True)
    keys = linear.elu_plus_one(k)
    expected = formula(q, k, v, linear.elu_plus_one(q), keys, causal=False)
    np.testing.assert_allclose(y, expected, atol=64 * EPS)
    np.testing.assert_allclose(state.total, keys.sum(1), rtol=32 * EPS)
    np.testing.assert_allclose(
        state.matrix, np.einsum("bskf,bskh->bkfh", keys, v), atol=64 * EPS * 17
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def values_and_gradients(form, chunk, name, arrays, state, lengths, cotangents):
    def f(arrays, state):
        return linear.attend(
            *arrays,
            feature_map=MAPS[name],
            key_lengths=lengths,
            state=state,
            return_state=True,
            implementation=form,
            chunk=chunk,
        )

    y, pull_back = jax.vjp(f, arrays, state)
    return y, pull_back(cotangents)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("form", "chunk"),
    [("recurrent", None), ("chunked", None), ("chunked", 1), ("chunked", 4), ("chunked", 13)],
)
def test_the_forms_agree_with_the_parallel_one_in_values_state_and_gradients(form, chunk, name):
    if name != "elu_plus_one" and chunk not in (None, 4):
        pytest.skip("one feature map is enough for every size of chunk")
    arrays, features = tuple(inputs()), linear._pair(MAPS[name]).keys(inputs()[1])
    state = jax.tree.map(lambda x: x * features.mean(), some_state(features.shape[-1]))
    random = np.random.default_rng(2)
    after = jax.tree.map(lambda x: random.standard_normal(x.shape) / features.mean(), state)
    after = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), after)
    cotangents = jnp.asarray(random.standard_normal((B, T, N, HV)), jnp.float32), after
    lengths = jnp.array([13, 8])
    found, expected = (
        values_and_gradients(*which, name, arrays, state, lengths, cotangents)
        for which in ((form, chunk), ("parallel", None))
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=256 * EPS * np.abs(other).max())


@pytest.mark.parametrize("name", ["elu_plus_one", "random"])
def test_gradients_are_those_of_finite_differences_in_float64(name):
    with jax.enable_x64(True):
        arrays = inputs(length=5, dtype=jnp.float64)
        size = {"elu_plus_one": H, "random": F}[name]
        state = jax.tree.map(lambda x: x.astype(jnp.float64), some_state(size))
        if name == "random":
            state = jax.tree.map(lambda x: x * RANDOM.keys(arrays[1]).mean(), state)
            # The shift of queries is a constant only as far as the quotient goes: no state out.
        f = functools.partial(
            linear.attend, feature_map=MAPS[name], implementation="chunked", chunk=2
        )
        y = jax.jit(f)(*arrays, state=state)
        assert y.dtype == jnp.float64
        check_grads(
            jax.jit(lambda q, k, v, matrix: f(q, k, v, state=State(matrix, state.total))),
            (*arrays, state.matrix),
            order=1,
            modes=["rev"],
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_the_state_joins_two_parts_into_one_whole(form, name):
    attend = functools.partial(
        linear.attend, feature_map=MAPS[name], implementation=form, return_state=True
    )

    @jax.jit
    def both(q, k, v):
        first, state = attend(q[:, :5], k[:, :5], v[:, :5])
        second, joined = attend(q[:, 5:], k[:, 5:], v[:, 5:], state=state)
        return attend(q, k, v), (jnp.concatenate([first, second], 1), joined)

    (whole, last), (found, joined) = both(*inputs())
    np.testing.assert_allclose(found, whole, atol=64 * EPS)
    for one, other in zip(joined, last):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=64 * EPS * np.abs(other).max())


@pytest.mark.parametrize("name", MAPS)
def test_steps_from_token_to_token_give_what_the_whole_gives(name):
    q, k, v = inputs()
    whole, last = linear.attend(q, k, v, feature_map=MAPS[name], return_state=True)
    step = jax.jit(functools.partial(linear.step, feature_map=MAPS[name]))
    state = State.empty(B, K, last.total.shape[2], HV)
    for t in range(T):
        y, state = step(q[:, t], k[:, t], v[:, t], state)
        np.testing.assert_allclose(y, whole[:, t], atol=64 * EPS)
    np.testing.assert_allclose(
        state.matrix, last.matrix, atol=64 * EPS * jnp.abs(last.matrix).max()
    )


@pytest.mark.parametrize("name", ["elu_plus_one", "random"])
@pytest.mark.parametrize("form", FORMS)
def test_no_query_sees_its_future(form, name):
    def mix(z):
        z = z.reshape(1, 7, 1, H)
        k, v = 2 + jnp.sin(z), jnp.cos(z)
        attend = functools.partial(linear.attend, feature_map=MAPS[name], implementation=form)
        return attend(2 + z, k, v)[0]

    testing.assert_causal(mix, jax.random.normal(jax.random.key(0), (7, H)))


def test_a_large_key_of_the_future_does_not_change_a_bit_of_the_past():
    q, k, v = inputs()
    attend = jax.jit(functools.partial(linear.attend, feature_map=RANDOM, chunk=4))
    changed = attend(q, k.at[:, 9:].multiply(30), v)
    np.testing.assert_array_equal(changed[:, :9], attend(q, k, v)[:, :9])
    assert np.isfinite(changed).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_key_adds_nothing(form):
    q, k, v = inputs()
    lengths = jnp.array([4, 10])
    attend = jax.jit(
        functools.partial(
            linear.attend, key_lengths=lengths, return_state=True, implementation=form
        )
    )
    y, state = attend(q, k, v)
    other, same = attend(q, k.at[0, 4:].add(1).at[1, 10:].add(1), v.at[0, 4:].add(1))
    np.testing.assert_array_equal(y, other)
    np.testing.assert_array_equal(state.matrix, same.matrix)
    seen = np.arange(T)[None, :, None, None] < np.array([4, 10])[:, None, None, None]
    total = (np.asarray(linear.elu_plus_one(k)) * seen).sum(1)
    np.testing.assert_allclose(state.total, total, rtol=32 * EPS)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gets_zeros_and_sends_zero_gradients(form):
    q, k, v = inputs()
    blind = q.at[0, :, 0].set(-1)  # no feature at all under relu
    attend = functools.partial(linear.attend, feature_map=linear.relu, implementation=form)

    def loss(q, k, v):
        y = attend(q, k, v, key_lengths=jnp.array([T, 0]))
        return jnp.square(y - 1).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(blind, k, v)
    assert (np.asarray(y)[0, :, 0] == 0).all()
    assert (np.asarray(y)[1] == 0).all()
    assert (np.asarray(y)[0, 4:, 1:] != 0).any(-1).mean() > 0.9
    assert all(np.isfinite(x).all() for x in gradients)
    assert all((np.asarray(x)[1] == 0).all() for x in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_inputs_are_summed_in_float32(form):
    narrow = inputs(dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in narrow]
    attend = functools.partial(linear.attend, implementation=form, return_state=True)
    (y, state), (expected, wide_state) = attend(*narrow), attend(*wide)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=64 * EPS)
    np.testing.assert_array_equal(state.matrix, wide_state.matrix)


def test_it_passes_through_vmap_scan_and_remat():
    q, k, v = inputs()
    f = functools.partial(linear.attend, implementation="chunked", chunk=4)

    def loss(q, through):
        return jnp.square(through(q)).sum()

    def mapped(q):
        return jax.vmap(lambda q, k, v: f(q[None], k[None], v[None])[0])(q, k, v)

    def scanned(q):
        one = lambda _, x: (None, f(*(y[None] for y in x))[0])  # noqa: E731
        return jax.lax.scan(one, None, (q, k, v))[1]

    plain = jax.jit(jax.value_and_grad(lambda q: loss(q, lambda q: f(q, k, v))))(q)
    for other in (mapped, scanned, jax.checkpoint(lambda q: f(q, k, v))):
        found = jax.jit(jax.value_and_grad(functools.partial(loss, through=other)))(q)
        np.testing.assert_allclose(found[0], plain[0], rtol=32 * EPS)
        np.testing.assert_allclose(found[1], plain[1], atol=64 * EPS * np.abs(plain[1]).max())


def test_memory_of_the_gradient_grows_with_the_length_and_not_with_its_square():
    def extra(form, length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32) for _ in "qkv")
        f = jax.grad(lambda *x: linear.attend(*x, implementation=form).sum(), argnums=(0, 1, 2))
        return jax.jit(f).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert extra("chunked", 4096) < 2.2 * extra("chunked", 2048)
    assert extra("parallel", 4096) > 3.5 * extra("parallel", 2048)


def test_elu_plus_one_is_positive_where_float32_rounds_its_parts_away():
    x = jnp.array([-60.0, -20.0, -1e-3, 0.0, 2.5])
    expected = np.where(x > 0, x + 1, np.exp(np.float64(x)))
    np.testing.assert_allclose(linear.elu_plus_one(x), expected, rtol=4 * EPS)
    assert np.isfinite(jax.grad(lambda x: linear.elu_plus_one(x).sum())(1e3 * x)).all()


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_taylor_features_multiply_to_the_second_order_series_of_the_exponential(channels):
    random = np.random.default_rng(0)
    q, k = jnp.asarray(random.standard_normal((2, 3, 11, channels)), jnp.float32)
    z = (np.float64(q) * k).sum(-1) / channels**0.5
    found = (linear.taylor(q) * linear.taylor(k)).sum(-1)
    np.testing.assert_allclose(found, 1 + z + z**2 / 2, rtol=64 * EPS, atol=64 * EPS)


def directions(maps, head_dim):
    """The rows w of random features, read off φ(x) / φ(0) = exp(w·x - |x|²/2)."""
    x = jnp.eye(head_dim)
    logs = jnp.log(maps.keys(x)) - jnp.log(maps.keys(0 * x))
    return (np.asarray(logs).T + 0.5 * head_dim**-0.5) * head_dim**0.25


def test_random_directions_are_orthogonal_in_blocks_and_of_every_sign():
    w = directions(linear.positive_random_features(jax.random.key(0), 8, 20), 8)
    products = w @ w.T
    same_block = np.arange(20)[:, None] // 8 == np.arange(20)[None] // 8
    off = products[same_block & ~np.eye(20, dtype=bool)]
    np.testing.assert_allclose(off, 0, atol=1e-3)
    assert np.abs(products[~same_block]).max() > 1
    norms = np.square(directions(linear.positive_random_features(jax.random.key(1), 8, 4000), 8))
    assert norms.sum(-1).mean() == pytest.approx(8, abs=5 * 4 / 4000**0.5)  # chi-squared of 8
    assert norms.sum(-1).std() == pytest.approx(4, abs=0.4)
    mean = directions(linear.positive_random_features(jax.random.key(2), 8, 4000), 8).mean(0)
    np.testing.assert_allclose(mean, 0, atol=5 / 4000**0.5)


def test_random_features_estimate_softmax_weights_without_bias_and_better_with_more():
    q, k = 0.5 * np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
    exact = np.exp(np.float64(q) @ k.T / 8**0.5)

    @functools.partial(jax.jit, static_argnums=1)
    def estimates(keys, num_features):
        def one(key):
            maps = linear.positive_random_features(key, 8, num_features)
            # Times what the quotient cancels: the largest feature of a query, the shift of the keys
            scale = maps.keys(jnp.zeros((1, 8)))[0, 0]
            row = jnp.asarray(q)
            w = (jnp.log(maps.keys(jnp.eye(8))) - jnp.log(scale)).T + 0.5 * 8**-0.5
            largest = (row @ w.T - (row**2).sum(-1, keepdims=True) * 0.5 * 8**-0.5).max(-1)
            found = maps.queries(row) @ maps.keys(jnp.asarray(k)).T
            return found * jnp.exp(largest)[:, None] / scale / num_features

        return jax.vmap(one)(keys)

    few = np.asarray(estimates(jax.random.split(jax.random.key(0), 400), 8))
    many = np.asarray(estimates(jax.random.split(jax.random.key(1), 400), 128))
    for found in (few, many):
        error = found.std(0) / 400**0.5
        assert (np.abs(found.mean(0) - exact) < 6 * error).mean() > 0.95
    ratio = np.median(few.std(0) / many.std(0))
    assert 3 < ratio < 6  # √16 = 4


def test_random_features_come_close_to_softmax_attention_and_elu_plus_one_does_not():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 64, 2, 16)), jnp.float32) for _ in "qkv")
    q, k = 0.6 * q, 0.6 * k  # the error grows exponentially with their squared norms
    softmax = attention.attend(q, k, v, attention.causal())

    def distance(feature_map):
        y = linear.attend(q, k, v, feature_map=feature_map)
        return float(jnp.linalg.norm(y - softmax) / jnp.linalg.norm(softmax))

    draw = functools.partial(linear.positive_random_features, jax.random.key(0), 16)
    many, few = distance(draw(1024)), distance(draw(64))
    assert many < 0.2
    assert many < 0.5 * few  # √16 = 4 where errors are small
    assert distance(linear.elu_plus_one) > 0.3


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_random_features_of_keys_of_any_size_stay_finite_with_their_gradients(size):
    q, k, v = inputs()
    f = jax.value_and_grad(
        lambda q, k, v: linear.attend(q, size * k, v, feature_map=RANDOM).sum(), (0, 1, 2)
    )
    y, gradients = jax.jit(f)(q, k, v)
    assert np.isfinite(y)
    assert all(np.isfinite(x).all() for x in gradients)


MASKED = {
    "none": (None, {"causal": False}),
    "causal": (attention.causal(), {}),
    "lengths": (attention.key_lengths(jnp.array([3, 11])), {"causal": False}),
    "both": (attention.causal() & attention.key_lengths(jnp.array([3, 11])), {}),
    "both_swapped": (attention.key_lengths(jnp.array([3, 11])) & attention.causal(), {}),
}


@pytest.mark.parametrize("name", MASKED)
def test_the_adapter_reads_causality_and_key_lengths_off_a_mask(name):
    mask, options = MASKED[name]
    if "lengths" in name or "both" in name:
        options = options | {"key_lengths": jnp.array([3, 11])}
    q, k, v = inputs()
    found = linear.as_attend(linear.relu)(q, k, v, mask)
    expected = linear.attend(q, k, v, feature_map=linear.relu, **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "mask",
    [
        attention.causal(1),
        attention.causal(jnp.array(0)),
        attention.window(3),
        attention.causal() | attention.key_lengths(jnp.array([3, 11])),
        attention.causal() & attention.window(3),
        attention.key_lengths(jnp.array([3, 11])) & attention.key_lengths(jnp.array([3, 11])),
    ],
)
def test_the_adapter_refuses_other_masks(mask):
    with pytest.raises(NotImplementedError, match="causal"):
        linear.as_attend()(*inputs(), mask)


@pytest.mark.parametrize("name", ["bias", "scale", "softcap", "sinks"])
def test_the_adapter_refuses_the_options_of_softmax(name):
    value = jnp.ones(N) if name in ("bias", "sinks") else 1.0
    with pytest.raises(NotImplementedError, match=name):
        linear.as_attend()(*inputs(), **{name: value})


def test_a_layer_takes_linear_attention_in_the_place_of_softmax(draw):
    layer = SelfAttention(num_heads=4, num_kv_heads=2, attend=linear.as_attend(chunk=4))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 12)), jnp.float32)
    params = draw(layer, x, attention.causal())
    testing.assert_causal(lambda x: layer.apply(params, x[None], attention.causal())[0], x[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementation": "recurrent", "causal": False}, "causal=False"),
        ({"implementation": "tpu", "causal": False}, "causal=False"),
        ({"implementation": "gpu", "causal": False}, "causal=False"),
        ({"implementation": "parallel", "chunk": 4}, "chunk=4"),
        ({"causal": False, "chunk": 4}, "chunk=4"),
    ],
)
def test_what_a_form_cannot_honour_it_refuses(arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        linear.attend(*inputs(), **arguments)


def test_arguments_that_cannot_be_are_named_in_the_error(untyped):
    q, k, v = inputs()
    wrong = {
        "T=9 is not S=13": lambda: linear.attend(q[:, :9], k, v),
        "chunk=0": lambda: linear.attend(q, k, v, chunk=0),
        "expected B=2": lambda: linear.attend(q, k, v, key_lengths=jnp.array([1, 2, 3])),
        "k has S=13, v has S=9": lambda: linear.attend(q, k, v[:, :9]),
        "N=6 is not a multiple of K=4": lambda: linear.step(
            q[:, 0], jnp.ones((B, 4, H)), jnp.ones((B, 4, HV)), some_state()
        ),
        "matrix has shape": lambda: linear.attend(q, k, v, state=some_state(H + 1)),
        "only H may change": lambda: linear.attend(q, k, v, feature_map=lambda x: x[:1]),
        "there is no implementation='xla'": lambda: linear.attend(q, k, v, implementation="xla"),
        "drawn for H=5 were given H=4": lambda: RANDOM.keys(k[..., :4]),
        "num_features=0": lambda: linear.positive_random_features(jax.random.key(0), H, 0),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_devices_hold_sequences_of_their_own():
    mesh = jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    spec = PartitionSpec("data")

    def gradients(*qkv):
        return jax.grad(lambda *x: jnp.square(linear.attend(*x, chunk=4)).sum(), (0, 1, 2))(*qkv)

    spread = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3)
    for found, expected in zip(jax.jit(spread)(*inputs()), gradients(*inputs())):
        np.testing.assert_allclose(found, expected, atol=64 * EPS * float(jnp.abs(expected).max()))
