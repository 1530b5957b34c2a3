import dataclasses
import gc
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.training import checkpoint
from jaxformer.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning

# Where reading or writing fails, orbax drops coroutines that complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = {"model": {"width": 64, "depth": 3}, "rate": 3e-4, "name": "ä"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict
    opt: tuple
    step: jax.Array
    key: jax.Array


@pytest.fixture
def collected():
    """Has what orbax dropped collected within the test, and not in one that knows nothing of it."""
    yield
    gc.collect()


def tree(step):
    """A small state whose every leaf depends on the step."""
    return {"w": jnp.arange(15.0).reshape(3, 5) + step, "key": jax.random.key(step)}


def saved(folder, *steps, config=CONFIG, **options):
    with Checkpoints(folder, config, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"next_record": 10 * step})


def reopened(folder, config=CONFIG):
    with Checkpoints(folder, config) as checkpoints:
        return checkpoints.restore(tree(0))


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return True


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_everything_comes_back_bit_for_bit(tmp_path):
    params = {
        "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "deep": {"a/b": jnp.arange(7, dtype=jnp.int8), "mask": jnp.array([True, False])},
        "none": jnp.zeros((0, 3)),
        "wide": np.array([2**62 + 1, -3]),
    }
    opt = optax.adamw(1e-3).init({"w": jnp.ones((3, 5))})
    state = State(params, opt, jnp.int32(4), jax.random.split(jax.random.key(5, impl="rbg"), 2))
    with Checkpoints(tmp_path / "run" / "checkpoints", CONFIG) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(4, state, {"next_record": 40, "parts": [1, 2.5]})
    restored = Checkpoints(tmp_path / "run" / "checkpoints", CONFIG).restore(state)
    assert restored.step == 4
    assert restored.data_position == {"next_record": 40, "parts": [1, 2.5]}
    assert same(restored.state, state)
    shapes = jax.eval_shape(lambda state: state, dataclasses.replace(state, params={}))
    with pytest.raises(
        CheckpointError, match=r"params\.wide: \"int64\[2\]\" there, \(absent\) here"
    ):
        Checkpoints(tmp_path / "run" / "checkpoints", CONFIG).restore(shapes)


def test_a_restored_state_trains_like_the_one_that_was_saved(tmp_path):
    # An uncommitted scalar that came back committed would refuse to meet sharded arrays.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = {
        "w": jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data"))),
        "n": jnp.int32(1),
    }
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        restored = checkpoints.restore(state).state
    step = jax.jit(lambda state: {"w": state["w"] * state["n"], "n": state["n"] + 1})
    assert same(step(restored), step(state))


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x = jnp.arange(100_000.0)
    expected = np.asarray(x).copy()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        for _ in range(9):
            x = update(x)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore({"x": x}).state["x"], expected)


def test_only_the_last_steps_are_kept_and_nothing_else_is_left(tmp_path):
    saved(tmp_path, 1, 2, 5, 7, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]
    assert reopened(tmp_path).step == 7


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P()])
def test_any_number_of_devices_restores_what_any_other_saved(tmp_path, spec):
    def placed(devices):
        mesh = jax.make_mesh(
            (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        state = {"w": jnp.arange(8.0 * 16).reshape(8, 16), "key": jax.random.key(3)}
        shardings = {"w": NamedSharding(mesh, spec), "key": NamedSharding(mesh, P())}
        return jax.device_put(state, shardings)

    for number, (before, after) in enumerate([(1, 8), (8, 4), (4, 1)]):
        with Checkpoints(tmp_path / str(number), CONFIG) as checkpoints:
            checkpoints.save(1, placed(before), {}, wait=True)
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed(after)
            )
            found = checkpoints.restore(like).state
        assert same(found, placed(after))
        assert found["w"].sharding == like["w"].sharding
        assert found["key"].sharding.device_set == like["key"].sharding.device_set


def test_another_config_is_refused_field_by_field_and_nothing_is_touched(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "meta" / "metadata").write_text("{}")
    before = contents(tmp_path)
    other = {"model": {"width": 128, "depth": 3, "bias": True}, "rate": 3e-4, "name": "ä"}
    for act in ("restore", "save"):
        with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(CheckpointError) as caught:
            checkpoints.restore(tree(0)) if act == "restore" else checkpoints.save(9, tree(9), {})
        told = str(caught.value)
        assert "model.width: 64 there, 128 here" in told
        assert "model.bias: (absent) there, true here" in told
        assert "rate" not in told
        assert "another folder" in told
    assert contents(tmp_path) == before


def test_other_arrays_are_refused_by_name_and_nothing_is_touched(tmp_path):
    saved(tmp_path, 1, 2)
    before = contents(tmp_path)
    for like, told in [
        (
            {**tree(0), "w": jnp.zeros((5, 3))},
            r'w: "float32\[3, 5\]" there, "float32\[5, 3\]" here',
        ),
        ({**tree(0), "w": jnp.zeros((3, 5), jnp.bfloat16)}, r'"bfloat16\[3, 5\]" here'),
        ({**tree(0), "new": jnp.zeros(2)}, r'new: \(absent\) there, "float32\[2\]" here'),
        ({"w": jnp.zeros((3, 5))}, r'key: "key<fry>\[\]" there, \(absent\) here'),
    ]:
        with (
            Checkpoints(tmp_path, CONFIG) as checkpoints,
            pytest.raises(CheckpointError, match=told),
        ):
            checkpoints.restore(like)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_never_passes_for_whole(tmp_path, damage):
    """Whatever file is hit, what comes back is what was saved at the step it claims to be."""
    saved(tmp_path / "good", 1, 2)
    rng = np.random.default_rng(3)
    files = sorted(path for path in (tmp_path / "good" / "2").rglob("*") if path.is_file())
    hits = [(path, rng.random()) for path in files for _ in range(2 if damage == "flip" else 1)]
    fallen = 0
    for number, (path, where) in enumerate(hits):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        hit = folder / path.relative_to(tmp_path / "good")
        content = bytearray(hit.read_bytes())
        if damage == "flip" and content:
            content[int(where * len(content))] ^= 1 << rng.integers(8)
        hit.write_bytes(content[: int(where * len(content))] if damage == "cut" else content)
        if damage == "remove":
            hit.unlink()
        recorded = warnings.catch_warnings(record=True, action="always", category=CheckpointWarning)
        with recorded as told, Checkpoints(folder, CONFIG) as checkpoints:
            restored = checkpoints.restore(tree(0))
            assert same(restored.state, tree(restored.step)), hit
            assert restored.data_position == {"next_record": 10 * restored.step}
            if restored.step == 1:
                checkpoints.save(2, tree(2), {})
        assert len(told) == (restored.step == 1)
        fallen += restored.step == 1
    assert fallen  # how many depends on what orbax wrote twice


@pytest.mark.usefixtures("collected")
def test_a_flipped_bit_in_the_data_falls_back_and_saving_goes_on(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (100, 100))}
    with Checkpoints(tmp_path, CONFIG, keep=4) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, {"w": state["w"] + step}, {"step": step})
    for step in (4, 6):
        largest = max((tmp_path / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)
    with Checkpoints(tmp_path, CONFIG, keep=4) as checkpoints:
        with pytest.warns(CheckpointWarning) as told:
            restored = checkpoints.restore(state)
        assert (restored.step, restored.data_position) == (2, {"step": 2})
        assert same(restored.state, {"w": state["w"] + 2})
        assert len(told) == 2
        assert "Step 6" in str(told[0].message)
        assert "step 2 is used instead" in str(told[0].message)
        assert "fingerprint" in str(told[0].message)
        for step in (3, 4, 6):  # two of them at numbers that the damaged steps had
            checkpoints.save(step, {"w": state["w"] * step}, {})
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["4", "6"]
    with Checkpoints(tmp_path, CONFIG, keep=4) as checkpoints:
        assert checkpoints.steps == [2, 3, 4, 6]
        assert same(checkpoints.restore(state).state, {"w": state["w"] * 6})


@pytest.mark.usefixtures("collected")
def test_strays_and_leftovers_of_kills_do_no_harm(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "7").mkdir()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "1", tmp_path / "trash" / "0")
    shutil.copytree(tmp_path / "1", tmp_path / "9")  # another step under a new name
    with pytest.warns(CheckpointWarning, match=r"Step 9 .*saved as step 1|Step 7 "):
        assert reopened(tmp_path).step == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"1", "2", "damaged", "notes.txt"}
    (tmp_path / "7").mkdir()
    with pytest.warns(CheckpointWarning):
        assert reopened(tmp_path).step == 2
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"7", "7+", "9"}


@pytest.mark.usefixtures("collected")
def test_if_no_step_is_whole_each_reason_is_told_and_nothing_moves(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "arrays" / "manifest.ocdbt").unlink()
    (tmp_path / "7").mkdir()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)step 7: .*step 2: .*step 1: .*start anew"):
        reopened(tmp_path)
    assert contents(tmp_path) == before


def test_a_step_that_is_not_newer_is_refused_aloud(tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(5, tree(5), {})
        for step in (4, 5):
            with pytest.raises(CheckpointError, match=f"Step {step} .*holds step 5"):
                checkpoints.save(step, tree(step), {})
    assert reopened(tmp_path).step == 5


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(5, tree(5), {}, wait=True)
        usage = shutil.disk_usage(tmp_path)._replace(free=60)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            CheckpointError, match=r"Step 6 .* 68 bytes .* 60 left.* step, 5, stands"
        ):
            checkpoints.save(6, tree(6), {})
        monkeypatch.undo()
        checkpoints.save(6, tree(6), {})
    assert reopened(tmp_path).step == 6


@pytest.fixture
def nearly_full(request, tmp_path):
    """A folder where a few hundred kB can be written, and no megabyte."""
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        yield tmp_path
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.block_until_ready(noise(1))  # what is compiled, and cached on disk, is so by now
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(step):
    return {"w": jax.random.normal(jax.random.key(step), (300_000,))}


# Orbax lets the error out of its writing threads too, and of writes it no longer waits for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
    ("nearly_full", "surfaces"),
    [("file size", "save"), ("file size", "close"), ("tmpfs", "wait")],
    indirect=["nearly_full"],
)
def test_a_write_that_fails_in_the_background_is_told_and_loses_nothing(
    nearly_full, monkeypatch, surfaces
):
    monkeypatch.setattr(Checkpoints, "_require_space", lambda *_: None)  # it filled up since
    small = {"w": jnp.arange(3.0)}
    checkpoints = Checkpoints(nearly_full, CONFIG)
    checkpoints.save(1, small, {})
    checkpoints.wait()
    told = r"Step 2 could not be saved into .*(File too large|No space left).* step, 1, stands"
    checkpoints.save(2, noise(2), {})
    act = {"save": lambda: checkpoints.save(3, small, {})}.get(
        surfaces, getattr(checkpoints, surfaces)
    )
    with pytest.raises(CheckpointError, match=told):
        act()
    assert [path.name for path in nearly_full.iterdir()] == ["1"]
    checkpoints.save(2, small, {})
    checkpoints.close()
    assert Checkpoints(nearly_full, CONFIG).restore(small).step == 2


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be used for checkpoints"):
        saved(tmp_path / "file", 1)


def test_the_error_of_the_body_is_not_replaced_and_the_save_is_finished(tmp_path):
    def fail():
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            checkpoints.save(3, tree(3), {})
            raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        fail()
    assert reopened(tmp_path).step == 3


def test_what_is_no_array_and_no_step_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="'n' is 3, not an array"):
        checkpoints.save(1, {"n": 3}, {})
    with pytest.raises(ValueError, match=r"same path 'a\.b'"):
        checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match="step=-1"):
        checkpoints.save(-1, tree(1), {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, CONFIG, keep=0)
    with pytest.raises(TypeError, match="not JSON"):
        Checkpoints(tmp_path, {"path": pathlib.Path()})


def test_importing_and_looking_into_an_empty_folder_loads_no_orbax(tmp_path):
    program = f"""
import json, sys
from jaxformer.training import checkpoint, data, fingerprint, interrupts, mnist
assert checkpoint.Checkpoints({str(tmp_path)!r}, {{}}).restore({{}}) is None
print(json.dumps(list(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    heavy = {"orbax", "flax", "grain", "optax", "jaxformer.ops", "jaxformer.layers"}
    assert not heavy & set(json.loads(output))


def test_preloading_imports_orbax_in_the_background():
    checkpoint.preload()
    assert "orbax.checkpoint" in sys.modules
