"""Compilers' reports are read right, and kernels are compiled in processes that leave nothing."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from jaxformer.analysis import _gpu_sass, _tpu_schedule, preflight

STAND_INS = """
import os, subprocess, time


def product():
    import jax, jax.numpy as jnp
    from jax.experimental import pallas as pl

    def kernel(x, y, z):
        @pl.when(pl.program_id(0) % 2 == 0)
        def _():
            z[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    call = pl.pallas_call(
        kernel,
        grid=2,
        in_specs=[pl.BlockSpec((256, 128), lambda i: (i, 0)), pl.BlockSpec(None)],
        out_specs=pl.BlockSpec((256, 256), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((512, 256), jnp.float32),
    )
    return call, (x, y)


def refused():
    raise NotImplementedError("no such\\nthing")


def crash():
    os._exit(7)


def slow():
    time.sleep(100)


def family():
    beats = os.environ["BEATS"]
    subprocess.run(["sh", "-c", f"while true; do echo >> {beats}; sleep 0.1; done"])
"""
CHECK_OF_A_FAMILY = """
import signal
import stand_ins
from jaxformer.analysis import preflight

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells turn off in background
list(preflight.check([(preflight.Kernel("family", ("v5e",), stand_ins.family), "v5e")] * 2))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a kernel of a function that the processes can import."""
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    (tmp_path / "temporary").mkdir()
    root = pathlib.Path(preflight.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    import stand_ins

    yield lambda name: preflight.Kernel(name, preflight.TARGETS, getattr(stand_ins, name))
    assert not list((tmp_path / "temporary").iterdir())


def test_a_schedule_is_read_into_regions_that_contain_one_another():
    lines = [f"  {n:#x}   : > {{ nop }}" for n in range(100)]
    lines[0] = "     0   :  { nop }"
    lines[29] = "  0x1d   : > { %9 = sbr.rel (%p1) target bundleno = 70 (0x46) }"
    lines[40] = "  0x28   : > { %2 = vmatmul.bf16 %1  ;;  %3 = vmatmul.bf16 %1 }\n  /* long */"
    lines[90] = "  0x5a   : > { %8 = sbr.rel (!%p) target bundleno = 10 (0xa) }"
    used = ["0 0"] * 100
    used[40], used[80] = "2 1", "0 3"
    table = "== CAPACITY:\nMXU, VALU\n 4 2\n== UTILIZATION:\n" + "\n".join(used)
    allocations = textwrap.dedent("""
        #allocation1 [shape = 'u8[1]', space=vmem, size = 0x9000, scoped]
        #allocation2 [shape = 'u8[1]', space=smem, size = 0x400, scoped]
        #allocation3_spill [shape = 'u32[8,128]', space=vmem, size = 0x1000, scoped]
    """)
    found = _tpu_schedule.parse("k", "\n".join(lines), table, allocations)
    assert (found.cycles, found.vmem, found.spills) == (100, 0xA000, 1)
    loop, branch = found.regions
    assert (loop.kind, loop.first, loop.last, loop.products) == ("loop", 10, 90, 2)
    assert (branch.kind, branch.first, branch.last, branch.cycles) == ("branch", 30, 69, 40)
    assert loop.slots == {"VALU": 2.0, "MXU": 0.5}
    assert branch.slots == {"MXU": 0.5, "VALU": 0.5}
    assert loop.contains(branch)
    assert found.bodies() == [branch]


def test_sass_is_counted_in_innermost_loops_that_multiply():
    said = (
        "ptxas info    : Function properties for kernel\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 32 bytes smem\n"
    )
    code = [".L_x_1:", "MOV R1, R2", ".L_x_2:", "HGMMA.64x128x16.F32 R1", "MUFU.EX2 R1, R2"]
    code += ["@P0 FADD R1, R2", "MUFU.RCP R1, R2", "@!P1 BRA `(.L_x_2)", "BRA `(.L_x_1)", "EXIT"]
    code = [x if x.startswith(".L") else f"        /*00a0*/       {x} ;" for x in code]
    sass = "\n//---- .text.kernel ----\n.text.kernel:\n" + "\n".join(code) + "\n//---- end"
    (found,) = _gpu_sass.parse(said, sass)
    assert (found.registers, found.spilled, found.shared) == (168, 12, 32)
    assert (found.products, found.exponentials) == ({"HGMMA": 1}, 1)
    assert found.loops == (_gpu_sass.Loop(5, 1, 1),)
    assert found.loops[0].per_exponential == 5.0


def test_results_come_in_order_with_the_reason_of_each_failure(stand_in):
    pairs = [(stand_in(name), "v5e") for name in ("crash", "refused")]
    crash, refused = preflight.check(pairs)
    assert (crash.kernel, refused.kernel) == ("crash", "refused")
    assert "ended with 7" in crash.error
    assert refused.error == "NotImplementedError: no such thing"


def test_whoever_stops_early_leaves_no_process_and_no_folder(stand_in):
    began = time.monotonic()
    results = preflight.check([(stand_in(name), "v5e") for name in ("refused", "slow")], workers=2)
    next(results)
    results.close()
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_no_process_and_no_folder(number, stand_in, tmp_path):
    beats = tmp_path / "beats"
    places = {"BEATS": str(beats), "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, "-c", CHECK_OF_A_FAMILY],
        env=os.environ | places,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if beats.exists() and process.poll() is None:
                break
            time.sleep(0.1)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size


def test_handlers_of_signals_are_put_back(stand_in):
    before = signal.getsignal(signal.SIGTERM)
    results = preflight.check([(stand_in("refused"), "v5e")])
    next(results)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    results.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_kernel_compiles_for_a_tpu_that_is_not_there(stand_in):
    pytest.importorskip("libtpu")
    (found,) = preflight.check([(stand_in("product"), "v5e")])
    assert found.error is None
    (schedule,) = found.programs
    (body,) = schedule.bodies()
    assert body.products > 0
    assert body.slots["MXU"] <= body.cycles < schedule.cycles
    assert schedule.vmem >= 2 * (256 * 128 + 128 * 256) + 4 * 256 * 256


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.11.2")
    assert "jaxformer[tpu]" in preflight.missing("v6e")
    assert "jaxformer[cuda]" in preflight.missing("sm_90a")
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.10.2")
    assert "0.10.2" in preflight.missing("sm_80")


def test_kernels_are_named_once_and_have_targets():
    names = [kernel.name for kernel in preflight.KERNELS]
    assert len(set(names)) == len(names)
    for kernel in preflight.KERNELS:
        assert set(kernel.targets) <= set(preflight.TARGETS)
        assert "forward" in kernel.name or "backward" in kernel.name
