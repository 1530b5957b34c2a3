"""What the compilers say of the kernels of attention: static figures, with no TPU and no GPU.

python -m benchmarks.kernels_static              ten minutes on two CPU cores

A TPU's cycles are bundles of its static schedule, which know nothing of memory. A GPU's figures are
registers and instructions. TPUs need libtpu, GPUs jax 0.11 with its CUDA plugin and nvdisasm; where
one is missing, its figures are, and a line on standard error says so.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import record
from jaxformer.analysis import preflight
from jaxformer.analysis._gpu_sass import Program
from jaxformer.analysis._tpu_schedule import Region, Schedule
from jaxformer.ops.attention import _flash_tpu, _linear_tpu

LENGTH, HEADS, CHANNELS, BLOCK = 4096, 8, 128, 1024
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
IDEAL = {"v5e": {"forward": 4096, "backward": 10_240}, "v6e": {"forward": 1024, "backward": 2560}}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile for.

    Attributes:
        targets: "v5e", "v6e" and those GPUs that `jaxformer preflight kernels` knows.
        untuned: Head sizes that the table of blocks of TPUs lacks.
    """

    targets: tuple[str, ...] = ("v5e", "v6e", "sm_90a")
    untuned: tuple[int, ...] = (96,)


def flash_on_tpu(kernel: str, target: str, schedule: Schedule) -> Iterator[tuple[str, dict]]:
    """The figures of one kernel for one chip."""
    _, function, mask, dtype = kernel.split(".")
    bodies = schedule.bodies()
    largest = max(body.products for body in bodies)
    full = sorted((x for x in bodies if x.products == largest), key=lambda body: body.cycles)
    binding = next(iter(full[0].slots.items()))
    if dtype != "bfloat16":
        return
    if mask == "segments" and len(full) > 1:
        ratio = full[-1].cycles / full[0].cycles
        yield f"{function}_segments_to_whole", {"static_ratio": round(ratio, 3)}
    if mask == "causal":
        figures = {"static_cycles": full[0].cycles, "ideal": IDEAL[target][function]}
        slot = {"slot": binding[0], "slot_cycles": round(binding[1])}
        yield f"{function}_whole_block", figures | slot | {"vmem_bytes": schedule.vmem}
        cut = min(bodies, key=lambda body: body.products)
        ratio = cut.cycles / cut.products * full[0].products / full[0].cycles
        yield f"{function}_diagonal_to_whole_per_product", {"static_ratio": round(ratio, 3)}
        if function == "forward":
            yield "forward_causal_kernel", {"static_cycles": causal(schedule)}


def causal(schedule: Schedule) -> int:
    """The cycles of the whole causal forward kernel, summed over the steps of its grid.

    A step costs the loop's body without the branches that it skips. Each row of blocks begins and
    ends once; whatever else may be skipped, such as the start of a transfer, counts each time.
    """
    bodies = schedule.bodies()
    whole = min(
        (x for x in bodies if x.products == max(y.products for y in bodies)),
        key=lambda body: body.cycles,
    )
    diagonal = min(bodies, key=lambda body: body.products)
    loop = next(x for x in schedule.regions if x.kind == "loop" and x.contains(whole))
    others = [x for x in schedule.regions if x.kind == "branch" and not x.products]
    before = [x for x in others if loop.contains(x) and x.last < bodies[0].first]
    after = [x for x in others if loop.contains(x) and x.first > bodies[-1].last]
    ends = sum(max((x.cycles for x in side), default=0) for side in (before, after))
    rows = LENGTH // BLOCK
    steps = rows * (rows + 1) // 2
    each = loop.cycles - sum(body.cycles for body in bodies) - ends
    once = steps * each + rows * (diagonal.cycles + ends) + (steps - rows) * whole.cycles
    return HEADS * once


def as_if_on(target: str) -> Any:
    """A context in which kernels choose their sizes as for this chip."""
    device = jax.sharding.AbstractDevice(KINDS[target], 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def untuned_on_tpu(head: int, target: str) -> Iterator[tuple[str, dict]]:
    """Cycles of a causal call with the nearest blocks of the table, against the best tried."""
    from scripts import make_tpu_blocks

    x = jax.ShapeDtypeStruct((1, 2048, 2, head), jnp.bfloat16)
    for (function, size), tried in make_tpu_blocks.CUTS.items():
        if size != x.dtype.itemsize:
            continue
        with as_if_on(target):
            default = _flash_tpu._sizes(function, x, x, x.dtype)
        cuts = dict.fromkeys([default, *(_flash_tpu.Cut(*cut) for cut in tried)])
        make = functools.partial(make_tpu_blocks.call, function)
        kernels = [
            preflight.Kernel(
                function, (target,), functools.partial(make, cut, *x.shape, dtype="bfloat16")
            )
            for cut in cuts
        ]
        results = preflight.check([(kernel, target) for kernel in kernels])
        costs = {
            cut: make_tpu_blocks.cycles(result.programs[0], cut.query)
            for cut, result in zip(cuts, results)
            if result.error is None
        }
        best = min(costs, key=costs.__getitem__)
        ratio = {"static_ratio": round(costs[default] / costs[best], 3)}
        yield f"{function}_head_{head}_default_to_tuned", ratio | {"tuned": tuple(best)}


def linear_on_tpu(kernel: str, target: str, schedules: list[Schedule]) -> Iterator[tuple]:
    """Cycles of a token and head: those of the loop over blocks of tokens, divided by its work."""
    function = kernel.split(".")[1]
    with as_if_on(target):
        plan = _linear_tpu._plan(CHANNELS, CHANNELS, HEADS, HEADS, None, jnp.bfloat16)
    chunks = plan.chunks if function == "forward" else plan.backward_chunks
    work = plan.chunk * chunks * plan.heads
    for schedule in schedules:
        loops: list[Region] = [x for x in schedule.regions if x.kind == "loop" and x.products]
        cycles = loops[0].cycles if loops else schedule.cycles
        figures = {"static_cycles_per_token_and_head": round(cycles / work, 3)}
        name = f"{function}_{schedule.name.partition('.')[0]}"
        yield name, figures | {"step": [cycles, work], "vmem_bytes": schedule.vmem}


def on_gpu(program: Program) -> dict[str, Any]:
    """Registers, spills, matrix instructions and SASS per exponential, whole loop first."""
    loops = [round(x.per_exponential, 1) for x in program.loops if x.exponentials]
    figures = {"registers": program.registers, "spilled_bytes": program.spilled}
    return figures | {"products": dict(program.products), "sass_per_exponential": loops}


def main(cfg: Config) -> None:
    """Compiles and prints."""
    jax.config.update("jax_platforms", "cpu")  # the report must not look for a TPU
    reasons = {target: preflight.missing(target) for target in cfg.targets}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(reason, file=sys.stderr)
    present = [target for target, reason in reasons.items() if reason is None]
    pairs = [
        (kernel, target)
        for target in present
        for kernel in preflight.KERNELS
        if target in kernel.targets and not kernel.name.endswith(("float32", ".float16"))
    ]
    with contextlib.closing(preflight.check(pairs)) as results:
        for result in results:
            report(result)
    for target in filter(KINDS.__contains__, present):
        for head in cfg.untuned:
            for figure, values in untuned_on_tpu(head, target):
                record.report(f"kernels_static/flash_tpu/{target}/{figure}", values)


def report(result: preflight.Result) -> None:
    """Prints the figures of a kernel."""
    module = result.kernel.partition(".")[0]
    name = f"kernels_static/{module}/{result.target}"
    programs: list[Any] = list(result.programs)
    if result.error is not None:
        record.report(f"{name}/{result.kernel}", {"error": result.error})
        return
    if module == "flash_tpu":
        figures = [y for x in programs for y in flash_on_tpu(result.kernel, result.target, x)]
    elif module == "linear_tpu":
        figures = list(linear_on_tpu(result.kernel, result.target, programs))
    else:
        rest = result.kernel.partition(".")[2]
        figures = [(f"{rest}/{program.name}", on_gpu(program)) for program in programs]
    for figure, values in figures:
        record.report(f"{name}/{figure}", values)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
