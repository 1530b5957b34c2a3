"""How time, memory and arithmetic of causal attention grow with the length of the text.

    python -m experiments.attention_scaling

Two heads of 64 channels in float32, two CPU cores, 37 s:

                 exponent of                    at 65,536 tokens      ms with gradients, at
            operations   memory   time        Gflop          MB     4,096 tokens   16,384
    dense         2.00     2.00   2.19        2,199     137,474              725
    flash         1.97     1.00   1.87        1,117         236              108    1,450
    sparse        1.50     1.00   1.54           17         508               24      207
    linear        1.00     0.99   1.10            4         102               13       61

Operations (of the forward pass) and memory are read off the programs and do not vary. Time does:
on busy cores its exponents were wrong by up to 0.5. Dense attention is timed to 4,096 tokens alone.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxformer.ops import attention
from jaxformer.ops.attention import flash, linear
from jaxformer.training import run
from jaxformer.typing import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, on a batch of one.

    Attributes:
        run: Folder for the report and the picture.
        lengths: Tokens; slopes are fitted to the last three that there is a figure for.
        dense_most: The longest text that dense attention is run on; beyond, it is only compiled.
        most: The longest text that the others are run on.
        num_heads: N.
        head_dim: H.
        repeats: Times that each is run; the fastest counts.
        seed: Of the inputs.
    """

    run: str = "runs/attention_scaling"
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    dense_most: int = 4096
    most: int = 16384
    num_heads: int = 2
    head_dim: int = 64
    repeats: int = 4
    seed: int = 0


def contenders() -> dict[str, Callable[[Array, Array, Array], Array]]:
    """Causal attention in four ways; the sparse one sees its block of √T, and a key of each."""
    causal = attention.causal()

    def fixed(q: Array, k: Array, v: Array) -> Any:
        pattern = attention.local_global(math.isqrt(q.shape[1]))
        return flash.attend(q, k, v, pattern & causal)

    return {
        "dense": functools.partial(attention.attend, mask=causal),
        "flash": functools.partial(flash.attend, mask=causal),
        "sparse": fixed,
        "linear": linear.attend,
    }


def shapes(cfg: Config, length: int) -> list[jax.ShapeDtypeStruct]:
    """Those of q, k and v."""
    shape = (1, length, cfg.num_heads, cfg.head_dim)
    return [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3


def operations(f: Callable[..., Any], *arguments: Any) -> int:
    """Counts multiplications and additions in all matrix products that a call of `f` goes through.

    Loops count as often as they run, and of branches the dearest: blocks that a mask empties are
    not in the loops.
    """
    return _counted(jax.make_jaxpr(f)(*arguments))


def _counted(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        inner = [_counted(x) for x in values if _is_jaxpr(x)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")


def measure(cfg: Config, attend: Callable[..., Array], length: int, *, timed: bool) -> dict:
    """Compiles output and gradients together; gives temporary MB, and the ms of a call."""

    def loss(*inputs: Array) -> Array:
        return (attend(*inputs) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = step.lower(*shapes(cfg, length)).compile()
    memory: Any = compiled.memory_analysis()
    found = {"megabytes": memory.temp_size_in_bytes / 1e6}
    if timed:
        random = np.random.default_rng(cfg.seed)
        inputs = [jnp.asarray(random.normal(size=x.shape), x.dtype) for x in shapes(cfg, length)]
        seconds = []
        for _ in range(cfg.repeats + 1):  # the first is not warm
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*inputs))
            seconds.append(time.perf_counter() - begin)
        found["milliseconds"] = 1e3 * min(seconds[1:])
    return found


def slope(values: Mapping[int, float]) -> float:
    """The exponent of the power of the length that fits the last three values best."""
    lengths, found = zip(*sorted(values.items())[-3:])
    return float(np.polyfit(np.log(lengths), np.log(found), 1)[0])


def scaling(cfg: Config) -> dict[str, Any]:
    """Measures all; for each contender its operations, MB and ms by length, and their slopes."""
    report: dict[str, Any] = {}
    names = f"{'':8}{'tokens':>8}{'Gflop':>9}{'MB':>10}{'ms':>10}"
    print(f"{names}   (operations forward; memory and time with gradients)")
    for name, attend in contenders().items():
        rows: dict[str, dict[int, float]] = {"operations": {}, "megabytes": {}, "milliseconds": {}}
        for length in cfg.lengths:
            timed = length <= (cfg.dense_most if name == "dense" else cfg.most)
            found = {"operations": operations(attend, *shapes(cfg, length))}
            found |= measure(cfg, attend, length, timed=timed)
            for key, value in found.items():
                rows[key][length] = value
            ms = f"{found['milliseconds']:10.1f}" if timed else f"{'-':>10}"
            gflop = found["operations"] / 1e9
            print(f"{name:8}{length:8,}{gflop:9.3f}{found['megabytes']:10.1f}{ms}", flush=True)
        report[name] = {**rows, "slopes": {key: slope(row) for key, row in rows.items()}}
    return report


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Operations, memory and time against the length, a line a contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "operations": "operations, forward",
        "megabytes": "temporary memory with gradients, MB",
        "milliseconds": "time with gradients, ms",
    }
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        for name, rows in report.items():
            label = f"{name}: slope {rows['slopes'][key]:.2f}"
            axes.plot(list(rows[key]), list(rows[key].values()), "o-", ms=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="tokens", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(cfg: Config) -> None:
    """Measures, prints the table and the slopes, and writes the report and the picture."""
    begin = time.monotonic()
    with run.Run(cfg.run) as record:
        report = scaling(cfg)
        record.report({"config": dataclasses.asdict(cfg), "contenders": report})
        draw(report, record.folder / "scaling.png")
        for name, rows in report.items():
            print(name, "grows as", ", ".join(f"{k} {v:.2f}" for k, v in rows["slopes"].items()))
        print(f"{time.monotonic() - begin:.0f} s; picture and report: {record.folder}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
