"""What CUDA's assembler says of a kernel with no GPU at hand: registers, spills, instructions.

XLA compiles for a card that it is told the properties of. The PTX that it and Mosaic write down is
assembled here once more, which tells the registers, and taken apart, which tells the instructions
of a card, SASS, in each innermost loop. Instructions are counted, not timed.
"""

import collections
import dataclasses
import importlib.util
import pathlib
import re
import subprocess
from collections.abc import Mapping
from typing import Any

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_most}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "sm_90a": {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "feature": "feature_extension: ACCELERATED_FEATURES",
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "shared": 233_472,
        "shared_most": 232_448,
        "cache": 62_914_560,
        "memory": 151_000_000_000,
        "bandwidth": 4_800_000_000_000,
    },
    "sm_80": {
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "minor": 0,
        "feature": "",
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "shared": 167_936,
        "shared_most": 166_912,
        "cache": 41_943_040,
        "memory": 85_000_000_000,
        "bandwidth": 2_039_000_000_000,
    },
}

_OPCODE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)(.*)"
)
_LABEL = re.compile(r"^\s*(\.L_\S+):")
_PROPERTIES = re.compile(
    r"properties for (?P<name>\S+)\s+\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+.*?Used (?P<registers>\d+) registers",
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices, as one thread sees it.

    Attributes:
        instructions: SASS instructions.
        exponentials: Of them `MUFU.EX2`.
        products: Of them `HGMMA` (of a warpgroup) or `HMMA` (of a warp).
    """

    instructions: int
    exponentials: int
    products: int

    @property
    def per_exponential(self) -> float:
        return self.instructions / self.exponentials if self.exponentials else float("inf")


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        name: As in the PTX.
        registers: Of a thread, at launch.
        spilled: Bytes of registers that a thread stores in memory or loads from there.
        shared: Bytes of shared memory, 0 if not known.
        products: Matrix instructions by opcode, `HGMMA` or `HMMA`.
        exponentials: Instructions `MUFU.EX2`.
        loops: Its innermost loops that multiply matrices, in the order of the program.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    products: Mapping[str, int]
    exponentials: int
    loops: tuple[Loop, ...]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Variables under which XLA and Mosaic write the PTX of each kernel to a folder."""
    flags = {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_dump_llvmir": "true",
        "xla_dump_emitter_re": ".*",
        "xla_dump_to": folder,
    }
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
    }


def tool(name: str) -> pathlib.Path | None:
    """Finds a program of the CUDA packages beside JAX: `ptxas` or `nvdisasm`."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for path in sorted(pathlib.Path(folder).glob(f"*/bin/{name}")):
            return path
    return None


def device(target: str) -> Any:
    """A card to compile for."""
    from jax.experimental import topologies

    config = _TARGET.format(**TARGETS[target])
    topology = topologies.get_topology_desc("card", "cuda", target_config=config, topology="1x1x1")
    return topology.devices[0]


def read(folder: pathlib.Path) -> list[Program]:
    """Assembles every PTX in the folder; reads kernels that multiply matrices or exponentiate."""
    found = []
    for path in sorted(folder.glob("*.ptx")):
        target = re.search(r"\.target (\w+)", path.read_text())
        assert target is not None
        binary = path.with_suffix(".cubin")
        said = _ran("ptxas", "-v", f"-arch={target[1]}", path, "-o", binary).stderr
        sass = _ran("nvdisasm", "-c", binary).stdout
        found += parse(said, sass, _shared(folder, path))
    return [x for x in found if x.products or x.exponentials]


def _ran(name: str, *arguments: Any) -> subprocess.CompletedProcess:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed.")
    ran = subprocess.run([program, *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{name} ended with {ran.returncode}: {ran.stderr}")
    return ran


def parse(said: str, sass: str, shared: int = 0) -> list[Program]:
    """Takes apart what the two tools say of a file of kernels.

    Args:
        said: What `ptxas -v` wrote on standard error.
        sass: What `nvdisasm -c` wrote.
        shared: Bytes of shared memory that are allocated at launch.
    """
    programs = []
    for match in re.finditer(_PROPERTIES.pattern, said, re.DOTALL):
        name = match["name"]
        text = sass.partition(f"\n.text.{name}:\n")[2].partition("//----")[0]
        fixed = re.search(r"(\d+) bytes smem", said[match.end() :].partition("\n")[0])
        opcodes, loops = _instructions(text)
        counts = collections.Counter(opcode.partition(".")[0] for opcode in opcodes)
        programs.append(
            Program(
                name,
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                shared or (int(fixed[1]) if fixed else 0),
                {name: counts[name] for name in ("HGMMA", "HMMA") if counts[name]},
                sum(opcode.startswith("MUFU.EX2") for opcode in opcodes),
                tuple(_loop(opcodes[first : last + 1]) for first, last in loops),
            )
        )
    return programs


def _instructions(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The opcodes, and the first and last of each innermost loop that multiplies matrices."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = set()
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _OPCODE.search(line):
            target = re.search(r"`\((\.L_[^)]*)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.add((labels[target[1]], len(opcodes)))
            opcodes.append(instruction[1])
    loops = {(a, b) for a, b in loops if any(_is_product(x) for x in opcodes[a : b + 1])}
    inner = [
        (a, b)
        for a, b in loops
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
    ]
    return opcodes, sorted(inner)


def _is_product(opcode: str) -> bool:
    return opcode.startswith(("HGMMA", "HMMA"))


def _loop(opcodes: list[str]) -> Loop:
    exponentials = sum(opcode.startswith("MUFU.EX2") for opcode in opcodes)
    return Loop(len(opcodes), exponentials, sum(map(_is_product, opcodes)))


def _shared(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Bytes of shared memory that a kernel asks for at launch, as Mosaic or Triton noted it."""
    resources = path.with_suffix(".resources.txt")
    if resources.exists():
        found = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text())
        return int(found[1]) if found else 0
    texts = (other.read_text() for other in folder.glob("*.triton-to-llvm.txt"))
    sizes = [int(size) for text in texts for size in re.findall(r"ttg\.shared = (\d+)", text)]
    return max(sizes, default=0)
