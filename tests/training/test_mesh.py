import subprocess
import sys

import jax
import pytest

from jaxformer.training import mesh


@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        ("data=8", {"data": 8}),
        ("data=4,model=2", {"data": 4, "model": 2}),
        (" model=3, data=1 ", {"model": 3, "data": 1}),
    ],
)
def test_a_mesh_is_written_as_sizes_of_named_axes(spec, axes):
    assert mesh.parse(spec) == axes
    assert list(mesh.parse(spec)) == list(axes)


@pytest.mark.parametrize(
    "spec", ["", "8", "data", "data=", "data=0", "data=-2", "data=2.5", "=4", "data=2,,", "2d=3"]
)
def test_anything_else_is_refused_with_how_it_is_written(spec):
    with pytest.raises(ValueError, match=r"like 'data=4' or .*, got '"):
        mesh.parse(spec)


def test_an_axis_given_twice_or_no_data_axis_is_refused():
    with pytest.raises(ValueError, match="got 'data=2,data=4'"):
        mesh.parse("data=2,data=4")
    with pytest.raises(ValueError, match="an axis named data, got 'model=2'"):
        mesh.parse("model=2")


def test_without_a_word_all_devices_lie_along_data():
    made = mesh.make()
    assert dict(made.shape) == {"data": jax.device_count()}
    assert set(made.devices.flat) == set(jax.devices())


def test_without_a_word_the_most_devices_that_divide_the_batch_are_taken():
    sizes = [mesh.make(batch=batch).shape["data"] for batch in (16, 12, 7, 11, 1)]
    assert sizes == [8, 6, 7, 1, 1]
    assert mesh.make("data=8", batch=12).shape["data"] == 8


def test_some_of_the_devices_and_a_second_axis_can_be_asked_for():
    assert mesh.make("data=2").devices.tolist() == jax.devices()[:2]
    assert dict(mesh.make("data=4,model=2").shape) == {"data": 4, "model": 2}


def test_more_devices_than_there_are_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"data=3,model=3 is of 9 devices, there are 8"):
        mesh.make("data=3,model=3")


def test_several_processes_cannot_leave_devices_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="data=2 is of 2 devices, there are 8"):
        mesh.make("data=2")
    assert mesh.make(batch=7).shape["data"] == 8


PROGRAM = """
import jax
from jaxformer.training import mesh
assert mesh.keep_host_memory() in (True, False)
assert mesh.usable_cores() >= 1
assert mesh.make("data=3").shape["data"] == jax.device_count() == 3
print("done")
"""


def test_a_fresh_process_simulates_the_devices_it_is_asked_for_and_keeps_its_memory(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "done\n", ran.stderr
