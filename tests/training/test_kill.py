"""Real processes, really killed: what they leave must lead to the same parameters, bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import jaxformer
from jaxformer.training.checkpoint import Checkpoints

STEPS = 120
DRIVER = pathlib.Path(__file__).with_name("kill_driver.py")


class Run:
    """One process of the driver, and the lines it prints."""

    def __init__(self, folder, *options):
        root = pathlib.Path(jaxformer.__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(folder), str(STEPS), *options],
            env=os.environ
            | {
                "PYTHONPATH": str(root),
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines_until(self, last):
        """The lines up to one that is `last`, or up to the end."""
        lines = []
        for line in self.process.stdout:
            lines.append(line.strip())
            if lines[-1] == str(last):
                break
        return lines

    def kill(self):
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def finish(self):
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out.split("\n")[:-1], err


def final(folder):
    with np.load(folder / "final.npz") as arrays:
        return [arrays[name].tobytes() for name in arrays.files]


def unfinished(folder):
    return list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "never"
    folder.mkdir()
    code, lines, err = Run(folder).finish()
    assert code == 0, err
    assert lines == ["ready", "from 0", *map(str, range(1, STEPS + 1))]
    return folder


def kill_at_a_random_moment(folder, rng):
    """Between `ready` and the ninth step: in the restore, compilation, a step or a save."""
    run = Run(folder)
    run.lines_until("ready")
    awaited = rng.randrange(-3, 9)
    if awaited < 0:
        time.sleep(rng.uniform(0, 0.4))
    else:
        run.lines_until(f"from {Checkpoints(folder / 'checkpoints', {}).latest_step or 0}")
        for _ in range(awaited):
            run.process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
    run.kill()


def kill_in_a_save(folder, rng):
    run = Run(folder)
    run.lines_until("ready")
    for _ in range(rng.randrange(2, 7)):
        run.process.stdout.readline()
    before = set(unfinished(folder))
    deadline = time.monotonic() + 60
    while not set(unfinished(folder)) - before and time.monotonic() < deadline:
        pass
    run.kill()


def kill_in_a_deletion(folder, rng):
    run = Run(folder, "--stall-in-deletion")
    assert run.lines_until("halfway")[-1] == "halfway", run.finish()
    run.kill()


def test_a_run_killed_twenty_two_times_ends_like_one_never_killed(never_killed):
    folder = never_killed.parent / "killed"
    folder.mkdir()
    rng = random.Random(1)
    ways = [kill_at_a_random_moment] * 14 + [kill_in_a_save] * 5 + [kill_in_a_deletion] * 3
    rng.shuffle(ways)
    saves_cut = deletions_cut = 0
    for way in ways:
        way(folder, rng)
        assert not (folder / "final.npz").exists()
        saves_cut += bool(unfinished(folder))
        if way is kill_in_a_deletion:
            thrown = (folder / "checkpoints" / "trash").iterdir()  # whole ones too, of other kills
            deletions_cut += any(
                any(x.rglob("*")) and not any(x.rglob("_CHECKPOINT_METADATA")) for x in thrown
            )
    assert saves_cut >= 4
    assert deletions_cut == 3

    code, lines, err = Run(folder).finish()
    assert code == 0, err
    assert lines[1] != "from 0"
    assert final(folder) == final(never_killed)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [str(STEPS - 2), str(STEPS)]  # nothing unfinished, half deleted or set aside


def test_sigterm_saves_and_a_flipped_bit_costs_one_checkpoint(never_killed):
    folder = never_killed.parent / "stopped"
    folder.mkdir()
    run = Run(folder)
    run.lines_until(31)
    run.process.send_signal(signal.SIGTERM)
    code, lines, err = run.finish()
    assert code == 0, err
    newest = int(lines[-1]) if lines else 31
    steps = Checkpoints(folder / "checkpoints", {}).steps
    assert steps[-1] == newest < STEPS

    code, lines, err = Run(folder, "--rate", "0.02").finish()
    assert code == 1
    assert "rate: 0.01 there, 0.02 here" in err
    assert Checkpoints(folder / "checkpoints", {}).steps == steps

    files = (folder / "checkpoints" / str(newest)).rglob("*")
    largest = max(files, key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)

    code, lines, err = Run(folder).finish()
    assert code == 0, err
    assert lines[1] == f"from {steps[-2]}"
    assert f"Step {newest} in" in err
    assert f"step {steps[-2]} is used instead" in err
    assert final(folder) == final(never_killed)
    assert (folder / "checkpoints" / "damaged" / str(newest)).is_dir()
