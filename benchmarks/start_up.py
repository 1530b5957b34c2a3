"""What a user waits for: the import, and the experiment's first training step, cold and warm.

python -m benchmarks.start_up              two minutes on two CPU cores
"""

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import tyro

from benchmarks import record


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        imports: Timings of the import.
        starts: Timings of a start with a warm compile cache, after one with an empty one.
    """

    imports: int = 15
    starts: int = 5


def process_time(code: str) -> float:
    """Seconds that a Python process takes to run `code` and end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def first_step(folder: str) -> float:
    """Seconds from the start of the experiment's process to the line of its first step."""
    command = [sys.executable, "-m", "experiments.ar_mnist", "--run", f"{folder}/{time.time_ns()}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "1/" in line and "loss" in line:
                break
        else:
            raise SystemExit("the experiment ended without a line for its first step")
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the experiment ended with {process.returncode}")
    return seconds


def main(cfg: Config) -> None:
    """Times and prints."""
    pairs = [
        (process_time("pass"), process_time("import jaxformer")) for _ in range(cfg.imports + 1)
    ][1:]
    extra = statistics.median(after - before for before, after in pairs)
    record.report("start_up/import", {"beyond_interpreter_ms": round(extra * 1e3, 2)})
    with tempfile.TemporaryDirectory() as folder:
        cold = first_step(folder)
        warm = [first_step(folder) for _ in range(cfg.starts)]
    record.report("start_up/first_step_cold", record.spread([cold]))
    record.report("start_up/first_step_warm", record.spread(warm))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
