"""Reads the reports of one experiment run with several seeds: mean and deviation of each figure.

    for n in 0 1 2; do python -m experiments.mae --seed $n --run runs/mae_$n; done
    python -m experiments.seeds runs/mae_0 runs/mae_1 runs/mae_2

The deviation is that of a sample, whose squares are divided by one less than there are runs.
"""

import json
import pathlib
import sys
from typing import Annotated, Any

import numpy as np
import tyro

from jaxformer.training import records

Runs = Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN")]
_MAY_DIFFER = ("run", "seed", "mesh", "save_every", "log_every")


def summarize(runs: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Returns the seeds, and mean, deviation and values of each number that all reports have.

    Raises:
        ValueError: If there are fewer than two runs, one has no report, or they differ in more than
            their seeds.
    """
    if len(runs) < 2:
        raise ValueError(f"a deviation needs two runs at least, got {len(runs)}.")
    configs = [_read(run, "config.json") for run in runs]
    reports = [_read(run, "report.json") for run in runs]
    for run, config in zip(runs, configs):
        for name in configs[0].keys() | config.keys():
            if name not in _MAY_DIFFER and config.get(name) != configs[0].get(name):
                raise ValueError(
                    f"{run} and {runs[0]} differ in {name}: no runs of one experiment."
                )
    seeds = [config["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs must have different seeds, got {seeds}.")
    found: dict[str, Any] = {"seeds": seeds}
    for name, first in reports[0].items():
        values: list[Any] = [report.get(name) for report in reports]
        if isinstance(first, float) and None not in values:
            deviation = float(np.std(values, ddof=1))
            found[name] = {"mean": float(np.mean(values)), "deviation": deviation, "runs": values}
    return found


def main(runs: Runs, json_line: bool = False) -> None:
    """Prints mean ± deviation of each figure.

    Args:
        runs: Folders of the runs.
        json_line: Numbers for programs, in one line, in place of the table.
    """
    found = summarize(runs)
    if json_line:
        print(json.dumps(found))
        return
    shown = {"seeds": found.pop("seeds")}
    for name, x in found.items():
        shown[name] = f"{x['mean']:.4g} ± {x['deviation']:.2g}"
    print(records.table(shown))


def _read(run: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} holds no finished run: {error}.") from error


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
