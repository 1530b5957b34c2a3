"""One pure step; the same numbers on one device, eight, by jit and by pmap, whole or in parts."""

import functools
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.training import checkpoint, ema, mesh, optimizers
from jaxformer.training.state import TrainState
from jaxformer.training.step import cast_floats, jit_step, make_train_step, place, pmap_step

RATE, STEPS = 0.01, 4


def params():
    random = np.random.default_rng(0)
    shapes = {
        "embed": {"table": (5, 7)},
        "layers_0": {"kernel": (7, 11), "bias": (11,)},
        "layers_1": {"kernel": (11, 7)},
        "head": {"kernel": (7, 3)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape, np.float32) / 2),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def batch(step, rows=48):
    random = np.random.default_rng(step)
    x = random.standard_normal((rows, 5), np.float32)
    return {"x": x, "y": np.sin(3 * x[:, :3]), "rows": np.arange(rows)}


def loss_fn(params, batch, key):
    x = batch["x"] @ params["embed"]["table"]
    hidden = jnp.tanh(x @ params["layers_0"]["kernel"] + params["layers_0"]["bias"][None])
    x = x + hidden @ params["layers_1"]["kernel"]
    error = x @ params["head"]["kernel"] - batch["y"]
    return jnp.mean(error**2), {
        "row": batch["rows"].mean(),
        "draw": jax.random.uniform(key),
    }


OPTIMIZERS = {
    "adamw": optimizers.adamw(RATE, weight_decay=0.1),
    "muon": optimizers.muon(RATE, RATE, weight_decay=0.1),
}


def start(optimizer, ema=False):
    return TrainState.create(params(), optimizer, jax.random.key(3), ema=ema)


def run(step, optimizer, ema=False, rows=48):
    state, history = start(optimizer, ema), []
    for i in range(STEPS):
        state, metrics = step(state, batch(i, rows))
        history.append({name: float(metrics[name]) for name in metrics if name != "draw"})
    return state, history


@functools.cache
def plain(name):
    return run(jax.jit(make_train_step(loss_fn, OPTIMIZERS[name])), OPTIMIZERS[name])


def assert_same(found, expected, atol=1e-6):
    (state, history), (other, expected_history) = found, expected
    for one, two in zip(history, expected_history, strict=True):
        chex.assert_trees_all_close(one, two, atol=atol, rtol=1e-6)
    chex.assert_trees_all_close(state.params, other.params, atol=atol, rtol=0)
    assert int(state.step) == int(other.step) == STEPS


def test_training_lowers_the_loss_and_reports_the_norms():
    for name in OPTIMIZERS:
        state, history = plain(name)
        assert history[-1]["loss"] < 0.9 * history[0]["loss"]
        assert all(row["grad_norm"] > 0 for row in history)
        np.testing.assert_allclose(history[-1]["param_norm"], optax.tree.norm(state.params), 1e-6)
    grads = jax.grad(lambda p: loss_fn(p, batch(0), jax.random.key(0))[0])(params())
    np.testing.assert_allclose(plain("adamw")[1][0]["grad_norm"], optax.tree.norm(grads), 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jit_on_eight_devices_gives_the_numbers_of_one(name):
    step = jit_step(make_train_step(loss_fn, OPTIMIZERS[name]), mesh.make("data=8"))
    found = run(step, OPTIMIZERS[name])
    assert_same(found, plain(name))
    assert len(found[0].params["head"]["kernel"].sharding.device_set) == 8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pmap_on_eight_devices_gives_the_numbers_of_one(name):
    step = pmap_step(make_train_step(loss_fn, OPTIMIZERS[name]))
    assert_same(run(step, OPTIMIZERS[name]), plain(name))


def test_pmap_uses_the_devices_of_a_mesh_and_no_others():
    pair = Mesh(np.asarray(jax.devices()[5:7]), ("data",))
    step = pmap_step(make_train_step(loss_fn, OPTIMIZERS["adamw"]), pair)
    found = run(step, OPTIMIZERS["adamw"])
    assert_same(found, plain("adamw"))
    assert found[0].step.sharding.device_set == set(pair.devices.flat)


def test_parts_of_the_state_may_be_split_as_well():
    devices, optimizer = mesh.make("data=1,model=7"), OPTIMIZERS["adamw"]

    def sharding(leaf):
        spec = PartitionSpec("model") if leaf.shape[:1] == (7,) else PartitionSpec()
        return NamedSharding(devices, spec)

    shardings = jax.tree.map(sharding, jax.eval_shape(lambda: start(optimizer)))
    step = jit_step(make_train_step(loss_fn, optimizer), devices, shardings)
    found = run(step, optimizer)
    assert_same(found, plain("adamw"))
    kernel = found[0].opt_state[1][0].mu["layers_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 11)


@pytest.mark.parametrize("spread", [False, True], ids=["one device", "eight devices"])
def test_accumulated_parts_give_the_step_of_the_whole_batch(spread):
    optimizer = OPTIMIZERS["adamw"]
    step = make_train_step(loss_fn, optimizer, accumulate=3)
    step = jit_step(step, mesh.make("data=8")) if spread else jax.jit(step)
    assert_same(run(step, optimizer), plain("adamw"))


def test_accumulated_parts_come_one_after_the_other():
    sizes = []

    def noting(params, batch, key):
        sizes.append(batch["x"].shape[0])
        return loss_fn(params, batch, key)

    step = make_train_step(noting, OPTIMIZERS["adamw"], accumulate=4)
    jax.eval_shape(step, start(OPTIMIZERS["adamw"]), batch(0))
    assert set(sizes) == {12}


def counting():
    traces = []

    def loss(params, batch, key):
        traces.append(key)
        return loss_fn(params, batch, key)

    return traces, loss


def test_the_step_is_pure_and_compiled_once():
    optimizer, (traces, loss) = OPTIMIZERS["adamw"], counting()
    step = jax.jit(make_train_step(loss, optimizer, ema_decay=0.9))
    state = start(optimizer, ema=True)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    first, again = step(state, batch(0)), step(state, batch(0))
    chex.assert_trees_all_equal(first[1], again[1])
    chex.assert_trees_all_equal(first[0].params, again[0].params)
    chex.assert_trees_all_equal((state.params, state.opt_state, state.ema), before)
    step(first[0], batch(1))
    assert len(traces) == 1


@pytest.mark.parametrize("spread", [lambda step: jit_step(step, mesh.make()), pmap_step])
def test_a_new_state_is_not_compiled_apart_from_those_that_follow(spread):
    optimizer, (traces, loss) = OPTIMIZERS["adamw"], counting()
    run(spread(make_train_step(loss, optimizer)), optimizer)
    assert len(traces) == 1


def test_the_key_of_a_step_depends_on_the_step_alone():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn, optimizer))
    state, draws = start(optimizer), []
    for i in range(3):
        state, metrics = step(state, batch(i))
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3
    fresh = start(optimizer)._replace(step=jnp.int32(2))
    assert float(step(fresh, batch(7))[1]["draw"]) == draws[2]
    other = start(optimizer)._replace(key=jax.random.key(4))
    assert float(step(other, batch(0))[1]["draw"]) != draws[0]
    assert state.key == start(optimizer).key


def test_parts_and_mapped_devices_draw_apart():
    def draws(params, batch, key):
        return jnp.mean(params["head"]["kernel"] ** 2), {"draw": jax.random.uniform(key)}

    optimizer, means = optax.sgd(0.0), []
    for spread in (jax.jit, pmap_step):
        parts = 3 if spread is jax.jit else 1
        step = spread(make_train_step(draws, optimizer, accumulate=parts))
        means.append(float(step(start(optimizer), batch(0))[1]["draw"]))
    key = jax.random.fold_in(jax.random.key(3), 0)
    for mean, count in zip(means, (3, 8)):
        each = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(count)]
        np.testing.assert_allclose(mean, np.mean(each), rtol=1e-6)


def test_the_average_follows_the_parameters_faster_at_first():
    optimizer, decay = optax.sgd(0.3), 0.2
    step = jax.jit(make_train_step(loss_fn, optimizer, ema_decay=decay))
    state = start(optimizer, ema=True)
    expected = np.asarray(state.params["head"]["kernel"], np.float64)
    for i in range(4):
        state, _ = step(state, batch(i))
        kept = min(decay, (1 + i) / (10 + i))  # 0.1, 0.18, then the limit
        expected = kept * expected + (1 - kept) * np.asarray(state.params["head"]["kernel"])
        np.testing.assert_allclose(state.ema["head"]["kernel"], expected, atol=1e-6)
    assert np.abs(expected - state.params["head"]["kernel"]).max() > 1e-4


def test_a_schedule_of_the_average_is_taken_as_it_is():
    optimizer, schedule = optax.sgd(0.3), ema.cosine(0.5, 1.0, 3)
    step = jax.jit(make_train_step(loss_fn, optimizer, ema_decay=schedule))
    state = start(optimizer, ema=True)
    for kept in (0.5, 0.625, 0.875, 1.0):
        before = np.asarray(state.ema["head"]["kernel"])
        state, _ = step(state, batch(0))
        expected = kept * before + (1 - kept) * np.asarray(state.params["head"]["kernel"])
        np.testing.assert_allclose(state.ema["head"]["kernel"], expected, atol=1e-6)


def learns_from_a_teacher(params, batch, key, state):
    """Follows the centred outputs of the average, and its centre follows their mean."""
    taught = loss_fn(params, batch, key)[0]
    outputs = batch["x"] @ state.ema["embed"]["table"]
    centre = state.extra["centre"]
    distance = batch["x"] @ params["embed"]["table"] - (outputs - centre[None])
    loss = taught + jnp.mean(distance**2) / (1 + state.step)
    moved = 0.75 * centre + 0.25 * outputs.mean(axis=0)
    return loss, ({"row": batch["rows"].mean()}, {"centre": moved})


def teacher_state():
    optimizer, extra = OPTIMIZERS["adamw"], {"centre": jnp.zeros(7)}
    return TrainState.create(params(), optimizer, jax.random.key(3), ema=True, extra=extra)


def teacher_step(spread, **options):
    options = {"stateful": True, "ema_decay": ema.cosine(0.9, 1.0, 5), **options}
    return spread(make_train_step(learns_from_a_teacher, OPTIMIZERS["adamw"], **options))


@functools.cache
def teacher_run():
    step, state, losses = teacher_step(jax.jit), teacher_state(), []
    for i in range(STEPS):
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_stateful_loss_sees_the_average_the_step_and_what_it_kept():
    optimizer, expected = OPTIMIZERS["adamw"], teacher_state()
    grad_fn = jax.jit(jax.value_and_grad(learns_from_a_teacher, has_aux=True))
    update = jax.jit(optimizer.update)
    for i in range(STEPS):
        (loss, (_, extra)), grads = grad_fn(expected.params, batch(i), expected.key, expected)
        np.testing.assert_allclose(loss, teacher_run()[1][i], rtol=1e-6)
        updates, moments = update(grads, expected.opt_state, expected.params)
        new = optax.apply_updates(expected.params, updates)
        kept = 1 - 0.1 * (1 + np.cos(np.pi * i / 5)) / 2
        average = optax.incremental_update(new, expected.ema, 1 - kept)
        expected = TrainState(expected.step + 1, new, moments, expected.key, average, extra)
    found = teacher_run()[0]
    chex.assert_trees_all_close(
        (found.params, found.ema, found.extra),
        (expected.params, expected.ema, expected.extra),
        atol=1e-6,
    )
    assert jnp.abs(found.extra["centre"]).max() > 1e-3


SPREADS = {
    "jit on eight": (lambda step: jit_step(step, mesh.make("data=8")), {}),
    "pmap on eight": (pmap_step, {}),
    "in three parts": (jax.jit, {"accumulate": 3}),
    "in parts by pmap": (pmap_step, {"accumulate": 2}),
}


@pytest.mark.parametrize("name", SPREADS)
def test_what_the_loss_keeps_is_the_same_however_the_batch_is_spread(name):
    spread, options = SPREADS[name]
    step, state = teacher_step(spread, **options), teacher_state()
    for i in range(STEPS):
        state, metrics = step(state, batch(i))
        np.testing.assert_allclose(metrics["loss"], teacher_run()[1][i], rtol=1e-5)
    kept = teacher_run()[0]
    chex.assert_trees_all_close(
        (state.params, state.ema, state.extra), (kept.params, kept.ema, kept.extra), atol=1e-6
    )


def test_a_run_with_a_teacher_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    step, state = teacher_step(jax.jit), teacher_state()
    for i in range(2):
        state, _ = step(state, batch(i))
    with checkpoint.Checkpoints(tmp_path, {}) as saved:
        saved.save(2, state, {}, wait=True)
        restored = saved.restore(teacher_state())
    assert restored is not None
    state = restored.state
    for i in range(2, STEPS):
        state, _ = step(state, batch(i))
    chex.assert_trees_all_equal(state._asdict(), teacher_run()[0]._asdict())


def test_the_teacher_is_cast_like_the_parameters_and_what_the_loss_keeps_is_not():
    seen = []

    def noting(params, batch, key, state):
        seen.extend({leaf.dtype for leaf in jax.tree.leaves((params, state.ema))})
        seen.append(state.extra["centre"].dtype)
        return loss_fn(params, batch, key)[0], ({}, state.extra)

    step = make_train_step(
        noting, OPTIMIZERS["adamw"], stateful=True, ema_decay=0.9, compute_dtype=jnp.bfloat16
    )
    state, _ = jax.eval_shape(step, teacher_state(), batch(0))
    assert seen == [jnp.bfloat16, jnp.float32]
    assert {x.dtype for x in jax.tree.leaves((state.ema, state.extra))} == {jnp.dtype("float32")}


def test_a_stateful_loss_may_keep_nothing():
    def looks(params, batch, key, state):
        return loss_fn(params, batch, key)[0], ({"at": state.step}, state.extra)

    optimizer = OPTIMIZERS["adamw"]
    state, metrics = jax.jit(make_train_step(looks, optimizer, stateful=True))(
        start(optimizer), batch(0)
    )
    assert state.extra is None
    assert metrics["at"] == 0


@pytest.mark.parametrize(
    "returned", [None, {"other": jnp.zeros(7)}, {"centre": jnp.zeros(5)}, {"centre": 0.0}]
)
def test_a_loss_that_returns_another_kind_of_extra_is_refused(returned):
    def loss(params, batch, key, state):
        extra = jax.tree.map(jnp.asarray, returned)
        return loss_fn(params, batch, key)[0], ({}, extra)

    step = make_train_step(loss, OPTIMIZERS["adamw"], stateful=True, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"given extra=.*float32\[7\].* and returned extra="):
        jax.eval_shape(step, teacher_state(), batch(0))


def test_what_is_kept_needs_a_loss_that_returns_it():
    step = make_train_step(loss_fn, OPTIMIZERS["adamw"], ema_decay=0.9)
    with pytest.raises(ValueError, match="stateful=True"):
        jax.eval_shape(step, teacher_state(), batch(0))


def test_computing_in_bfloat16_keeps_the_state_in_float32_and_the_loss_close():
    seen = []

    def noting(params, batch, key):
        seen.append({leaf.dtype for leaf in jax.tree.leaves(params)})
        loss, metrics = loss_fn(params, cast_floats(batch, jnp.bfloat16), key)
        return loss.astype(jnp.float32), metrics

    optimizer = OPTIMIZERS["adamw"]
    step = make_train_step(noting, optimizer, ema_decay=0.9, compute_dtype=jnp.bfloat16)
    state, history = run(jax.jit(step), optimizer, ema=True)
    assert seen == [{jnp.dtype(jnp.bfloat16)}]
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 4 * 5  # parameters, two moments and the average
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    expected = plain("adamw")[1]
    for row, exact in zip(history, expected):
        assert 0 < abs(row["loss"] - exact["loss"]) < 2**-6 * exact["loss"]  # eight bits, twice


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers():
    optimizer, devices = optax.sgd(0.1), mesh.make("data=8")
    pure = make_train_step(loss_fn, optimizer)
    for step in (jit_step(pure, devices), pmap_step(pure)):
        with pytest.raises(ValueError, match=r"B=10 does not split over data=8"):
            step(start(optimizer), batch(0, rows=10))
    for parts in (3, 4, 11):
        step = make_train_step(loss_fn, optimizer, accumulate=parts)
        with pytest.raises(ValueError, match=f"accumulate={parts} does not divide .* B=10"):
            step(start(optimizer), batch(0, rows=10))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="accumulate=0"):
        make_train_step(loss_fn, optax.sgd(0.1), accumulate=0)
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"ema_decay={decay}"):
            make_train_step(loss_fn, optax.sgd(0.1), ema_decay=decay)


@pytest.mark.parametrize(("decay", "ema"), [(0.9, False), (None, True)])
def test_a_step_and_a_state_must_agree_on_the_average(decay, ema):
    step = make_train_step(loss_fn, optax.sgd(0.1), ema_decay=decay)
    with pytest.raises(ValueError, match="ema_decay and a state created with ema=True"):
        step(start(optax.sgd(0.1), ema), batch(0))


def test_a_placed_batch_is_split_along_data_and_stays_where_it_is():
    devices = mesh.make("data=4,model=2")
    placed = place(batch(0, rows=12), devices)
    assert placed["x"].sharding == NamedSharding(devices, PartitionSpec("data"))
    assert placed["x"].addressable_shards[0].data.shape == (3, 5)
    np.testing.assert_array_equal(placed["x"], batch(0, rows=12)["x"])
    assert place(placed, devices)["x"] is placed["x"]


def test_only_floating_point_leaves_are_cast():
    tree = {"a": jnp.ones(2), "b": jnp.arange(2), "key": jax.random.key(0)}
    found = cast_floats(tree, jnp.bfloat16)
    assert found["a"].dtype == jnp.bfloat16
    assert found["b"].dtype == tree["b"].dtype
    assert found["key"].dtype == tree["key"].dtype


PROCESS = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jaxformer.training import mesh, optimizers
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step, place, pmap_step

rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
devices, rows = mesh.make("data=4"), np.arange(60, dtype=np.float32).reshape(12, 5) / 60
optimizer = optimizers.adamw(0.1)
pure = make_train_step(lambda p, b, key: (jnp.mean((b @ p) ** 2), {}), optimizer)
for spread in (jit_step, pmap_step):
    state = TrainState.create(jnp.ones(5), optimizer, jax.random.key(0))
    step = spread(pure, devices)
    for _ in range(3):
        state, metrics = step(state, rows[rank::2])
    print(float(metrics["loss"]), *np.asarray(state.params).tolist())
for batch, axes in ((rows[:5], devices), (rows, mesh.make("data=1,model=4"))):
    try:
        place(batch, axes)
    except ValueError as error:
        print(error)
print(place(rows, devices).shape, place(rows, devices.local_mesh).shape)
"""


def test_two_processes_with_half_of_the_rows_each_take_the_same_step():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PATH": "/usr/bin:/bin"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs

    optimizer = optimizers.adamw(0.1)
    pure = make_train_step(lambda p, b, key: (jnp.mean((b @ p) ** 2), {}), optimizer)
    rows, alone = np.arange(60, dtype=np.float32).reshape(12, 5) / 60, jax.jit(pure)
    state = TrainState.create(jnp.ones(5), optimizer, jax.random.key(0))
    for _ in range(3):
        state, metrics = alone(state, rows)
    for stdout, _ in outputs:
        lines = [line for line in stdout.splitlines() if not line.startswith("[Gloo]")]
        for numbers in lines[:2]:
            loss, *found = map(float, numbers.split())
            np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
            np.testing.assert_allclose(found, state.params, atol=1e-6)
        assert lines[2:] == [
            "a batch of B=5 does not split over data=2 devices.",
            "data=1 does not split over 2 processes.",
            "(24, 5) (12, 5)",
        ]
