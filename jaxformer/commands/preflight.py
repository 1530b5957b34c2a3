"""The command `jaxformer preflight`."""

import contextlib
import dataclasses
import json as json_format
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from jaxformer.analysis import preflight

Chips = Annotated[
    tuple[Literal["v5e", "v5p", "v6e", "tpu7x", "sm_90a", "sm_80"], ...],
    tyro.conf.UseAppendAction,
]
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")]


def run(arguments: Sequence[str]) -> int:
    """Runs the command that the first argument names.

    Returns:
        The exit code: 0 if every kernel compiles, 1 if one does not, 2 if none could be tried.

    Raises:
        ValueError: If a name is of no kernel.
        SystemExit: If the arguments are none, with code 2, or ask for help.
    """
    return tyro.extras.subcommand_cli_from_dict(
        {"kernels": kernels},
        prog="jaxformer preflight",
        description="Checks for devices that are not there.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def kernels(*, chip: Chips = (), kernel: Names = (), json: bool = False) -> int:
    """Compiles the kernels of attention for TPUs and GPUs, without one.

    Cycles and instructions are static: they are counted in the compiled program, not timed.

    Args:
        chip: A target; may be given several times; all if not given.
        kernel: Beginning of the names of kernels; may be given several times; all if not given.
        json: A line of JSON for each kernel and target, in place of the table.
    """
    wanted = tuple(kernel) or ("",)
    for name in wanted:
        if not any(one.name.startswith(name) for one in preflight.KERNELS):
            names = ", ".join(one.name for one in preflight.KERNELS)
            raise ValueError(f"there is no kernel {name!r}; there are {names}.")
    reasons = {target: preflight.missing(target) for target in chip or preflight.TARGETS}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(f"jaxformer: {reason}", file=sys.stderr)
    pairs = [
        (one, target)
        for target, reason in reasons.items()
        for one in preflight.KERNELS
        if reason is None and target in one.targets and one.name.startswith(wanted)
    ]
    if not pairs:
        print("jaxformer: nothing could be checked", file=sys.stderr)
        return 2
    width = max(len(one.name) for one, _ in pairs)
    failed = False
    with contextlib.closing(preflight.check(pairs)) as results:
        for result in results:
            failed |= result.error is not None
            if json:
                print(json_format.dumps(dataclasses.asdict(result)), flush=True)
                continue
            for line in rows(result):
                print(f"{result.kernel:{width}}  {result.target:6}  {line}", flush=True)
    return int(failed)


def rows(result: preflight.Result) -> list[str]:
    """Says in a line for each program what the compiler made of it, or the error."""
    if result.error is not None:
        return [f"FAILED  {result.error}"]
    described = _tpu_row if result.target in preflight.TPUS else _gpu_row
    return [described(program) for program in result.programs] or ["compiled"]


def _tpu_row(schedule: Any) -> str:
    bodies = ", ".join(f"{body.cycles:,}" for body in schedule.bodies())
    return (
        f"compiled  {schedule.vmem / 2**20:5.1f} MiB VMEM, {schedule.spills} registers spilled"
        f"  cycles of the bodies: {bodies or schedule.cycles}"
    )


def _gpu_row(program: Any) -> str:
    products = ", ".join(f"{count} {name}" for name, count in program.products.items())
    loops = ", ".join(f"{x.per_exponential:.1f}" for x in program.loops if x.exponentials)
    return (
        f"compiled  {program.registers} registers, {program.spilled} bytes spilled, "
        f"{program.shared / 2**10:.0f} KiB shared  {products}"
        f"  SASS per exponential: {loops or 'none in a loop'}"
    )
