"""Finds the block sizes of the TPU kernels of attention by compiling, and rewrites their table.

    python scripts/make_tpu_blocks.py           needs libtpu and no TPU; ten minutes on an idle core
    python scripts/make_tpu_blocks.py --quick   head size 128 in bfloat16 alone, two minutes

A candidate costs the cycles of a causal call of 16,384 tokens, by its static schedule. Entries of
the table that are not asked for stay as they are.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxformer.analysis import _tpu_schedule, preflight
from jaxformer.analysis._tpu_schedule import Schedule
from jaxformer.ops import attention
from jaxformer.ops.attention import _flash_tpu, _tpu_blocks
from jaxformer.ops.attention._flash_tpu import Cut

CHIPS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
LENGTH = 16_384
CUTS = {
    ("forward", 2): [
        (1024, 1024, 128, 256, 1),
        (1024, 1024, 256, 256, 1),
        (1024, 1024, 128, 512, 1),
        (1024, 1024, 256, 512, 2),
        (1024, 1024, 512, 512, 1),
        (512, 512, 256, 256, 1),
        (512, 512, 256, 512, 1),
    ],
    ("backward", 2): [
        (1024, 1024, 256, 256, 1),
        (1024, 1024, 256, 256, 2),
        (1024, 1024, 256, 512, 1),
        (512, 512, 256, 256, 1),
        (512, 512, 512, 256, 1),
    ],
    ("forward", 4): [(512, 512, 128, 256, 1), (512, 512, 256, 256, 1), (256, 256, 128, 256, 1)],
    ("backward", 4): [(512, 512, 256, 256, 1), (256, 256, 128, 256, 1), (256, 256, 128, 128, 2)],
}
TEXT = '''"""Block sizes of the TPU kernels of attention: the best compiled, by static schedule.

Made by scripts/make_tpu_blocks.py with libtpu {libtpu}; no chip has run them. Head sizes that are
missing take the nearest entry. Blocks of float32 are small, so that they compile in seconds.
"""

# chip: {{(pass, head size, bytes of a number): (query, key, rows, columns, ahead)}}
TABLE = {{
{entries}}}
'''


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
        chips: Names of `CHIPS`.
        passes: "forward" and "backward".
        heads: Head sizes.
        sizes: Bytes of a number: 2 is bfloat16, 4 float32.
        quick: Head size 128 in bfloat16 alone.
        write: Whether to rewrite the table.
    """

    chips: tuple[str, ...] = tuple(CHIPS)
    passes: tuple[str, ...] = ("forward", "backward")
    heads: tuple[int, ...] = (64, 128, 192, 256)
    sizes: tuple[int, ...] = (2, 4)
    quick: bool = False
    write: bool = True


def call(which: str, cut: Cut, *shape: int, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    """A causal call of a pass, shape B T N H, and the shapes of its arguments."""
    q = jax.ShapeDtypeStruct(shape, dtype)
    options = {"bias": None, "scale": 0.1, "softcap": None, "sinks": None, "block_sizes": cut}
    if which == "forward":
        return functools.partial(_flash_tpu.forward, mask=attention.causal(), **options), (q, q, q)

    def backward(q: Any, k: Any, v: Any, out: Any, d_out: Any) -> Any:
        lse = jnp.zeros(shape[:3])
        given = (q, k, v, attention.causal(), out, lse, d_out, lse)
        return _flash_tpu.backward(*given, **options)[:3]

    return backward, (q, q, q, q, q)


def cycles(schedule: Schedule, block: int) -> int:
    """The cycles of a causal call for one head; of its blocks some are whole, some diagonal.

    What a step may skip, such as writing a result, counts once for a row of blocks.
    """
    bodies = sorted(schedule.bodies(), key=lambda body: (-body.products, body.cycles))
    whole, diagonal = bodies[0], bodies[-1]
    inside = [x for x in schedule.regions if not x.products]
    loop = next(x for x in schedule.regions if x.kind == "loop" and x.contains(whole))
    inside = [x for x in inside if loop.contains(x)]
    once = sum(x.cycles for x in inside if not any(y.contains(x) for y in inside))
    each = loop.cycles - once - sum(body.cycles for body in bodies)
    rows = LENGTH // block
    steps = rows * (rows + 1) // 2
    return steps * each + rows * (once + diagonal.cycles) + (steps - rows) * whole.cycles


def cost(device: Any, which: str, head: int, size: int, cut: Cut, folder: pathlib.Path) -> float:
    """Compiles a candidate and prints its cycles; infinite if it does not compile."""
    for path in folder.iterdir():
        path.unlink()
    dtype = jnp.bfloat16 if size == 2 else jnp.float32
    began = time.monotonic()
    try:
        function, arguments = call(which, cut, 1, 2048, 2, head, dtype=dtype)
        preflight.compile_on(device, function, arguments)
    except jax.errors.JaxRuntimeError as error:
        print(*cut, "does not compile:", str(error)[:80], flush=True)
        return float("inf")
    seconds = time.monotonic() - began
    (schedule,) = _tpu_schedule.read(folder)
    found = cycles(schedule, cut.query)
    print(*cut, f"{found:,} cycles, {schedule.cycles} bundles, {seconds:.0f} s", flush=True)
    return found


def search(cfg: Config, folder: pathlib.Path) -> dict[str, dict[tuple, Cut]]:
    """Compiles all candidates, and returns the best of each kind."""
    found: dict[str, dict[tuple, Cut]] = {}
    heads, sizes = ((128,), (2,)) if cfg.quick else (cfg.heads, cfg.sizes)
    for chip, size, head, which in itertools.product(cfg.chips, sizes, heads, cfg.passes):
        print(chip, which, "head size", head, "bytes", size, flush=True)
        device, cuts = _tpu_schedule.device(chip), [Cut(*cut) for cut in CUTS[which, size]]
        costs = {cut: cost(device, which, head, size, cut, folder) for cut in cuts}
        found.setdefault(CHIPS[chip], {})[which, head, size] = min(costs, key=costs.__getitem__)
    return found


def text(table: dict[str, dict[tuple, tuple]], libtpu: str) -> str:
    """The module of the table."""
    entries = ""
    for kind, chip in table.items():
        order = sorted(chip, key=lambda key: (key[2], key[1], key[0] == "backward"))
        lines = "".join(f'        ("{k[0]}", {k[1]}, {k[2]}): {tuple(chip[k])},\n' for k in order)
        entries += f'    "{kind}": {{\n{lines}    }},\n'
    return TEXT.format(libtpu=libtpu, entries=entries)


def main(cfg: Config) -> None:
    """Compiles and rewrites."""
    with tempfile.TemporaryDirectory() as name:
        os.environ |= _tpu_schedule.environment(pathlib.Path(name))
        jax.config.update("jax_platforms", "cpu")
        found = search(cfg, pathlib.Path(name))
    table = {kind: chip | found.get(kind, {}) for kind, chip in _tpu_blocks.TABLE.items()}
    if cfg.write:
        path = pathlib.Path(str(_tpu_blocks.__file__))
        path.write_text(text(table, metadata.version("libtpu")))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
