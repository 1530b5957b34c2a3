"""The door means what dense attention means, under every transformation, or says why it cannot."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import _xla_tiles, flash

CASES = {case.name: case for case in testing.attention_cases()}
ROOMY = {"query_length": 7, "key_length": 11, "num_heads": 6, "num_kv_heads": 3, "value_dim": 5}
CASE = testing.AttentionCase(
    "roomy", lambda c: attention.causal(4) & attention.key_lengths(jnp.array([3, 0, 11])), **ROOMY
)


def moving(inputs):
    """The arguments that have derivatives."""
    return {n: x for n, x in inputs.items() if isinstance(x, jax.Array)}


def total(attend, inputs, arrays):
    """A scalar that depends on each output."""
    out, lse = attend(**inputs | arrays, return_lse=True)
    weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return (out * weights).sum() + jnp.sin(jnp.where(jnp.isinf(lse), 0, lse)).sum()


def assert_close(found, expected, units=64):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.float64(one), np.float64(other)
        eps = float(jnp.finfo(jax.tree.leaves(expected)[0].dtype).eps)
        np.testing.assert_allclose(one, other, atol=units * eps * max(np.abs(other).max(), 1e-2))


ONE_BLOCK = ("causal", "segments", "bias_by_head", "everything_at_once")


@pytest.mark.parametrize(
    ("name", "block"), [(name, 4) for name in CASES] + [(name, 512) for name in ONE_BLOCK]
)
def test_outputs_and_derivatives_of_both_modes_are_those_of_dense_attention(
    name, block, monkeypatch
):
    monkeypatch.setattr(_xla_tiles, "BLOCK", block)
    monkeypatch.setattr(_xla_tiles, "TILE", 60 if block == 4 else 1 << 19)
    testing.assert_attention(CASES[name], flash.attend)


def test_a_structure_taken_for_another_is_not_met_in_a_cache():
    one, other = attention.causal(), attention.key_lengths(jnp.array([1, 2]))
    assert jax.tree.structure(one & other) != jax.tree.structure(one | other)


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        ("qkv", attention.causal(4)),
        ("q", attention.window(3, 1, 4)),
        ("kv", attention.key_lengths(jnp.array([3, 0, 11]))),
        (("q", "sinks"), None),
        (("bias",), attention.causal(4)),
        (("scale", "v"), attention.causal(jnp.array([0, 1, 4]))),
    ],
)
def test_a_mapped_axis_gives_what_one_call_each_gives(names, mask):
    inputs = CASE.inputs() | {"mask": mask, "sinks": jnp.ones(6), "scale": jnp.array(0.5)}
    inputs["bias"] = jnp.cos(jnp.arange(66.0)).reshape(6, 1, 11)
    arrays = {n: jnp.stack([inputs[n], 2 * inputs[n], -inputs[n]]) for n in names}
    f = functools.partial(total, flash.attend, inputs)
    g = functools.partial(total, attention.attend, inputs)

    @jax.jit
    def both(arrays):
        mapped = jax.vmap(jax.value_and_grad(f))(arrays)
        outside = jax.grad(lambda x: jax.vmap(f)(x).sum())(arrays)
        ones = jax.tree.map(jnp.ones_like, arrays)
        forward = jax.vmap(lambda x, t: jax.jvp(f, (x,), (t,))[1])(arrays, ones)
        expected = jax.vmap(jax.value_and_grad(g))(arrays)
        tangents = jax.vmap(lambda x, t: jax.jvp(g, (x,), (t,))[1])(arrays, ones)
        return (mapped, outside, forward), (expected, expected[1], tangents)

    assert_close(*both(arrays))


def test_lengths_may_differ_between_mapped_elements():
    inputs = CASE.inputs()
    lengths = jnp.array([[3, 0, 11], [11, 5, 1]])

    def call(attend, lengths):
        return attend(**inputs | {"mask": attention.key_lengths(lengths)})

    found = jax.vmap(functools.partial(call, flash.attend))(lengths)
    assert_close(found, jnp.stack([call(attention.attend, x) for x in lengths]))


def test_the_second_derivative_is_that_of_dense_attention():
    inputs = CASE.inputs() | {"softcap": 2.0}
    arrays = {n: inputs[n] for n in "qkv"}
    vector = jax.tree.map(jnp.cos, arrays)

    def products(attend):
        f = functools.partial(total, attend, inputs)
        over_reverse = jax.jvp(jax.grad(f), (arrays,), (vector,))[1]
        slope = lambda x: jax.jvp(f, (x,), (vector,))[1]  # noqa: E731
        twice = jax.grad(lambda x: sum(map(jnp.vdot, jax.grad(f)(x).values(), vector.values())))
        return over_reverse, jax.grad(slope)(arrays), twice(arrays)

    found, expected = jax.jit(lambda: (products(flash.attend), products(attention.attend)))()
    assert_close(found, expected, units=256)


def test_scan_and_remat_change_nothing():
    inputs = dataclasses.replace(CASE, value_dim=7).inputs()

    def deep(wrap, q):
        def layer(q, _):
            return wrap(lambda q: flash.attend(**inputs | {"q": q}))(q), None

        return jnp.sin(jax.lax.scan(layer, q, None, length=3)[0]).sum()

    plain, remat = (
        jax.jit(jax.grad(functools.partial(deep, w))) for w in (lambda f: f, jax.checkpoint)
    )
    assert_close(remat(inputs["q"]), plain(inputs["q"]))


@pytest.mark.parametrize("spec", [("data",), (None, None, "heads"), ("data", None, "heads")])
def test_each_device_attends_to_its_own_under_shard_map(spec):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    case = dataclasses.replace(CASE, batch=2, num_heads=8, num_kv_heads=4)
    inputs = case.inputs() | {"mask": attention.causal(4)}
    arrays = {n: inputs[n] for n in "qkv"}
    P = PartitionSpec(*spec)

    def local(arrays):
        return flash.attend(**arrays, mask=inputs["mask"])

    sharded = jax.shard_map(local, mesh=mesh, in_specs=P, out_specs=P)
    f = jax.jit(jax.value_and_grad(lambda a: jnp.sin(sharded(a)).sum()))
    g = jax.jit(jax.value_and_grad(lambda a: jnp.sin(attention.attend(**inputs | a)).sum()))
    placed = jax.device_put(arrays, NamedSharding(mesh, P))
    assert_close(f(placed), g(arrays))


def test_keys_that_all_devices_share_get_the_sum_of_their_gradients():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    inputs = dataclasses.replace(CASE, query_length=8).inputs()
    q, k, v = (inputs[n] for n in "qkv")
    split, whole = PartitionSpec(None, "data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split, whole, whole), out_specs=split)
    def local(q, k, v):
        place = 2 * jax.lax.axis_index("data")
        return flash.attend(q, k, v, attention.causal(place))

    def grads(f):
        return jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2)))(q, k, v)

    assert_close(grads(local), grads(lambda *x: attention.attend(*x, attention.causal())))


def test_parts_of_the_keys_are_merged_to_the_whole():
    inputs = CASE.inputs() | {"mask": None}
    q, k, v = (inputs[n] for n in "qkv")

    def parts(q, k, v):
        cuts = (slice(0, 4), slice(4, 4), slice(4, 11))
        each = [flash.attend(q, k[:, c], v[:, c], return_lse=True) for c in cuts]
        return flash.merge(*each)

    def both(q, k, v):
        y, pull = jax.vjp(parts, q, k, v)
        z, pull_dense = jax.vjp(functools.partial(attention.attend, return_lse=True), q, k, v)
        return (y, pull(z)), (z, pull_dense(z))

    assert_close(*jax.jit(both)(q, k, v))


def test_nothing_is_as_large_as_the_weights():
    case = testing.AttentionCase("", lambda c: attention.causal(), 1, 4096, 4096, 2, 2, 8, 8)
    inputs = case.inputs()
    f = jax.jit(jax.grad(lambda q: flash.attend(**inputs | {"q": q}).sum()))
    memory = f.lower(inputs["q"]).compile().memory_analysis().temp_size_in_bytes
    assert memory < 2 * 4096 * 4096 * 4 / 8


def test_work_on_blocks_that_a_mask_empties_is_saved():
    case = testing.AttentionCase("", None, 1, 4096, 4096, 1, 1, 8, 8)

    def steps(mask):
        scans: list[int] = []
        x = case.inputs() | {"mask": mask}
        jaxpr = jax.make_jaxpr(flash.attend)(**x)
        for line in str(jaxpr).splitlines():
            scans += [int(n) for n in re.findall(r"length=(\d+)", line)]
        return max(scans)

    assert steps(attention.window(512)) == 8 + 7
    assert steps(attention.causal()) == 10  # bigger blocks
    assert steps(None) == 16


def test_logits_of_any_size_stay_finite():
    x = CASE.inputs()
    grads = jax.jit(jax.grad(lambda q: flash.attend(**x | {"q": q, "k": 1e4 * x["k"]}).sum()))
    assert np.isfinite(grads(1e4 * x["q"])).all()


def test_no_query_sees_its_future():
    def mix(z):
        z = z.reshape(1, 5, 1, 3)
        return flash.attend(z, jnp.sin(z), jnp.cos(z), attention.causal())[0]

    testing.assert_causal(mix, jax.random.normal(jax.random.key(0), (5, 3)))


@pytest.mark.parametrize(("axis", "size"), [("query_length", 0), ("key_length", 0), ("batch", 0)])
def test_empty_axes_are_allowed(axis, size):
    case = dataclasses.replace(CASE, **{axis: size})
    inputs = case.inputs() | {"mask": None}
    out, lse = flash.attend(**inputs, return_lse=True)
    assert out.shape == (*inputs["q"].shape[:3], 5)
    assert lse.shape == inputs["q"].shape[:3]
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


def test_the_choice_is_named_with_its_reasons():
    x = CASE.inputs()
    choice = flash.choose(x["q"], x["k"], x["v"])
    assert choice.implementation == "xla"
    assert str(choice) == "xla"
    assert str(flash.Choice("xla", {"gpu": "it rains"})) == "xla (not gpu: it rains)"
    with pytest.raises(ValueError, match="no implementation 'cuda'; there are tpu, gpu"):
        flash.attend(x["q"], x["k"], x["v"], implementation="cuda")


def test_masks_and_shapes_that_do_not_fit_are_named(untyped):
    x = CASE.inputs()
    with pytest.raises(ValueError, match="mask has B=2, the attention has B=3"):
        flash.attend(x["q"], x["k"], x["v"], attention.key_lengths(jnp.array([1, 2])))
    with pytest.raises(ValueError, match="N=6 is not a multiple of K=4"):
        flash.attend(x["q"], jnp.ones((3, 11, 4, 7)), jnp.ones((3, 11, 4, 5)))


def test_one_compilation_serves_all_lengths():
    traces = 0

    @jax.jit
    def call(lengths):
        nonlocal traces
        traces += 1
        return flash.attend(**CASE.inputs() | {"mask": attention.key_lengths(lengths)})

    for lengths in ([1, 2, 3], [4, 5, 6]):
        call(jnp.array(lengths))
    assert traces == 1
