"""What libtpu's compiler says of a kernel with no TPU at hand: its static schedule.

libtpu compiles for any slice that it is told the name of, and writes down the bundles of
instructions that each program became. One bundle issues in one cycle. That counts neither transfers
from memory nor conflicts between its banks, and is an estimate from below.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:\s*(?:> *)*\{")
_BRANCH = re.compile(r"sbr\.rel[^;]*?target bundleno = (\d+)")
_VMEM = re.compile(r"#allocation\d+(_spill)? \[.*?space=vmem, size = (0x[0-9a-f]+)")
_SHORT = 20  # bundles; no loop or branch that matters is shorter


@dataclasses.dataclass(frozen=True)
class Region:
    """The bundles of a loop's body, or of a branch that may be skipped.

    Attributes:
        kind: "loop" or "branch".
        first: Number of the first bundle.
        last: Number of the last, included.
        products: Matrix instructions.
        slots: The cycles that each unit needs at least for its share, largest first.
    """

    kind: str
    first: int
    last: int
    products: int
    slots: Mapping[str, float]

    @property
    def cycles(self) -> int:
        return self.last - self.first + 1

    def contains(self, other: "Region") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One program.

    Attributes:
        name: As in the compiled module.
        cycles: Bundles in all, each counted once.
        vmem: Bytes of vector memory, spilled registers included.
        spills: Spilled vector registers.
        regions: Its loops and branches, outer ones first.
    """

    name: str
    cycles: int
    vmem: int
    spills: int
    regions: tuple[Region, ...]

    def bodies(self) -> list[Region]:
        """The innermost regions that multiply matrices, in the order of the program."""
        found = [region for region in self.regions if region.products]
        return [x for x in found if not any(x.contains(y) for y in found)]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Variables under which libtpu compiles without a TPU and writes its schedules to a folder."""
    labels = ".*(post-ra|pre-delay_hlo-static-per-bundle-utilization).*"
    flags = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": labels,
    }
    return {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else one process on the machine may use it
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
    }


def device(chip: str) -> Any:
    """A chip to compile for, in a process with the environment from above."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


def read(folder: pathlib.Path) -> list[Schedule]:
    """Reads the schedules of all programs that multiply matrices."""
    found = []
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        name = re.sub(r"^\d+-|-\d+-packed-bundles-post-ra\.txt$", "", path.name)
        if "schedule-analysis" in path.name or "vmatmul" not in (text := path.read_text()):
            continue
        table = next(folder.glob(f"*-{name}-*pre-delay_hlo-static-per-bundle-utilization.txt"))
        allocations = next(folder.glob(f"*-{name}-*[0-9]-post-ra.txt")).read_text()
        found.append(parse(name, text, table.read_text(), allocations))
    return found


def parse(name: str, bundles: str, utilization: str, allocations: str) -> Schedule:
    """Takes apart what libtpu writes of one program.

    Args:
        name: For the result.
        bundles: Its schedule: a line, or more, for each bundle, numbered from 0.
        utilization: For each bundle how often it uses each unit, after how often it could.
        allocations: The program before, which lists what it allocates.
    """
    texts: list[str] = []
    for line in bundles.splitlines():
        if _BUNDLE.match(line):
            texts.append(line)
        elif texts:
            texts[-1] += line
    products = np.cumsum([0] + [text.count("vmatmul") for text in texts])
    units, used = _utilization(utilization)
    spans = set()
    for at, text in enumerate(texts):
        for target in map(int, _BRANCH.findall(text)):
            spans.add(("loop", target, at) if target <= at else ("branch", at + 1, target - 1))
    regions = []
    for kind, first, last in sorted(spans, key=lambda span: (span[1], -span[2])):
        if last - first >= _SHORT:
            total = used[min(last + 1, len(used) - 1)] - used[min(first, len(used) - 1)]
            slots = sorted(zip(units, total.tolist()), key=lambda slot: -slot[1])
            count = int(products[last + 1] - products[first])
            regions.append(Region(kind, first, last, count, {unit: n for unit, n in slots if n}))
    sizes = [(bool(spill), int(size, 16)) for spill, size in _VMEM.findall(allocations)]
    vmem, spills = sum(size for _, size in sizes), sum(spill for spill, _ in sizes)
    return Schedule(name, len(texts), vmem, spills, tuple(regions))


def _utilization(text: str) -> tuple[list[str], np.ndarray]:
    """The units, and the cycles that each needs for all bundles before the n-th, shape n units."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line)
    units = [unit.strip() for unit in lines[start - 2].split(",")]
    capacity = np.array(lines[start - 1].split(), float)
    rows = [line.split() for line in lines[start + 1 :] if line.strip()]
    used = np.array(rows, float).reshape(-1, len(units)) / capacity
    return units, np.concatenate([np.zeros((1, len(units))), used.cumsum(axis=0)])
