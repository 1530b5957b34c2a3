import json

import pytest

from jaxformer import cli
from jaxformer.analysis import preflight
from jaxformer.analysis._gpu_sass import Loop, Program
from jaxformer.analysis._tpu_schedule import Region, Schedule

BODY = Region("branch", 30, 4334, 64, {"MXU": 4096.0})
SCHEDULE = Schedule("k", 5000, 3 * 2**20, 7, (BODY,))
PROGRAM = Program("k", 168, 0, 98304, {"HGMMA": 24}, 66, (Loop(340, 34, 12),))


@pytest.fixture
def preflight_command(monkeypatch, capsys):
    """Runs the command where compiling is pretended: exit code, standard output and error."""

    def run(*arguments, missing=(), error=None):
        def check(pairs):
            for kernel, target in pairs:
                programs = (SCHEDULE if target in preflight.TPUS else PROGRAM,)
                yield preflight.Result(kernel.name, target, error, 1.0, programs)

        monkeypatch.setattr(preflight, "check", check)
        monkeypatch.setattr(
            preflight, "missing", lambda target: "not here" if target in missing else None
        )
        code = cli.main(["preflight", "kernels", *arguments])
        return code, *capsys.readouterr()

    return run


def test_each_kernel_and_target_is_a_line(preflight_command):
    code, out, _ = preflight_command("--kernel", "flash_triton.forward", "--kernel", "flash_tpu")
    names = [kernel for kernel in preflight.KERNELS if "flash_t" in kernel.name]
    names = [kernel for kernel in names if "triton.backward" not in kernel.name]
    assert code == 0
    assert len(out.splitlines()) == sum(len(kernel.targets) for kernel in names)
    assert "v5e     compiled    3.0 MiB VMEM, 7 registers spilled" in out
    assert "4,305" in out
    assert "168 registers, 0 bytes spilled, 96 KiB shared  24 HGMMA" in out
    assert "10.0" in out


def test_json_is_one_line_for_each(preflight_command):
    code, out, _ = preflight_command("--json", "--chip", "v6e", "--kernel", "linear_tpu.forward")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (code, found["kernel"], found["target"]) == (0, "linear_tpu.forward", "v6e")
    assert found["programs"][0]["regions"][0]["slots"] == {"MXU": 4096.0}


def test_a_kernel_that_fails_gives_1_and_says_why(preflight_command):
    code, out, _ = preflight_command("--chip", "v5e", error="ValueError: too large")
    assert code == 1
    assert "FAILED  ValueError: too large" in out


def test_what_is_not_installed_is_said_and_the_rest_is_checked(preflight_command):
    code, out, err = preflight_command(missing=preflight.GPUS)
    assert code == 0
    assert err == "jaxformer: not here\n"
    assert "sm_90a" not in out


def test_nothing_to_check_gives_2(preflight_command):
    code, out, err = preflight_command("--chip", "sm_90a", missing=preflight.GPUS)
    assert (code, out) == (2, "")
    assert "nothing could be checked" in err


def test_a_name_of_no_kernel_gives_2_and_the_names_there_are(preflight_command):
    code, _, err = preflight_command("--kernel", "flush")
    assert code == 2
    assert "'flush'" in err
    assert "flash_tpu.forward" in err


def test_targets_of_the_command_are_those_of_the_analysis():
    from typing import get_args

    from jaxformer.commands import preflight as command

    assert set(get_args(get_args(get_args(command.Chips)[0])[0])) == set(preflight.TARGETS)
