r"""Trained on short texts, read on long ones: which positions still mean something there?

    python -m experiments.length_extrapolation

Nats a character of Python's manual, the same 16,384 in each column, after 300 steps on texts of 64
characters: 64, 128, 256 or 512 are read at once, of which the last 64 count, so that more text
should help. It does with ALiBi, and at twice the length with NTK-aware rotations, by a little. One
seed; 7 min 12 s in all on two busy CPU cores:

                           1×      2×      4×      8×
    none                1.966   2.254   2.447   2.519
    learned             1.477   3.404   3.915   3.979    the last row again beyond the table
    sinusoidal          1.516   3.374   4.221   4.952
    RoPE                1.391   1.397   1.676   2.322
    RoPE, linear        1.391   2.243   2.995   3.310    slower rotations of the same weights
    RoPE, NTK           1.391   1.388   1.645   2.465    likewise
    RoPE, YaRN          1.391   1.428   1.474   1.645    likewise
    ALiBi               1.504   1.468   1.476   1.478
    T5 bias             1.600   1.834   2.413   2.772
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from experiments import text_lm, texts
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops.rope import Rope
from jaxformer.training import mesh, run
from jaxformer.typing import PyTree

Stretch = Callable[[int, float], Rope]
NAMES = {
    "none": "none",
    "learned": "learned, the last one again",
    "sinusoidal": "sinusoidal",
    "rotary": "RoPE",
    "alibi": "ALiBi",
    "buckets": "T5 bias",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the texts, of the models, and of their training.

    Attributes:
        run: Folder for the report and the picture.
        data: "embedded", "tfds:DIR", or text files, which are joined; all by characters.
        positions: Kinds to train a model of.
        model: Sizes of all; the text settles `vocab_size`, and the kind the positions.
        context: Tokens of the texts trained on.
        times: How many times longer those are that are read.
        tokens: How many of the validation text are predicted.
        steps, batch: Training steps of each model, and texts in each.
        learning_rate: Peak, for Muon: of the hidden matrices.
        adam_learning_rate: Peak, for AdamW: of everything else.
        seed: Of everything random.
    """

    run: str = "runs/length_extrapolation"
    data: tuple[str, ...] = ("embedded",)
    positions: tuple[str, ...] = tuple(NAMES)
    model: TransformerConfig = TransformerConfig(
        1, 128, 3, 4, 4, 32, 344, qk_norm=True, tie_embeddings=False
    )
    context: int = 64
    times: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 16384
    steps: int = 300
    batch: int = 32
    learning_rate: float = 0.04
    adam_learning_rate: float = 0.006
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.positions) - set(NAMES)
        if unknown or not self.positions:
            raise ValueError(f"positions must be among {[*NAMES]}, got {self.positions}.")
        if min(self.times, default=0) < 1 or self.tokens < 1:
            raise ValueError(f"times and tokens must be at least 1, got {self}.")


def ropes(kind: str) -> dict[str, Stretch]:
    """Ways to read with a model of this kind: its rotations by context, and times that context."""
    plain: dict[str, Stretch] = {NAMES[kind]: lambda context, times: Rope()}
    if kind != "rotary":
        return plain
    return plain | {
        "RoPE, linear": lambda context, times: Rope(kind="linear", factor=times),
        "RoPE, NTK": lambda context, times: Rope(kind="dynamic", length=context),
        "RoPE, YaRN": lambda context, times: Rope(kind="yarn", factor=times, length=context),
    }


def model_of(cfg: Config, kind: str, vocab_size: int, **changes: Any) -> Decoder:
    """The decoder with one kind of positions.

    The buckets of distances end where the texts trained on do, so that none is left untrained.
    """
    sizes = {"vocab_size": vocab_size, "positions": kind, "max_distance": cfg.context}
    sizes["max_length"] = cfg.context if kind == "learned" else 0
    return Decoder(dataclasses.replace(cfg.model, **sizes | changes))


def train(cfg: Config, model: Decoder, text: texts.Text, devices: Mesh) -> PyTree:
    """Trains on windows of `cfg.context` tokens, the same ones for every model."""
    names = ("steps", "batch", "context", "learning_rate", "adam_learning_rate", "seed")
    settings = text_lm.Config(**{name: getattr(cfg, name) for name in names})
    state, step, batches = text_lm.begin(settings, model, text, devices)
    for count in range(cfg.steps):
        state, metrics = step(state, batches.batch(count))
        run.check_finite(count + 1, metrics)
    return state.params


def lengthened(params: PyTree, rows: int) -> PyTree:
    """Repeats the last learned position up to so many, which have none of their own."""
    if "places" not in params["params"]:
        return params
    table = params["params"]["places"]["table"]
    more = jnp.pad(table, [(0, rows - len(table)), (0, 0)], mode="edge")
    return {"params": params["params"] | {"places": {"table": more}}}


def read(
    cfg: Config, kind: str, stretch: Stretch, params: PyTree, text: texts.Text, devices: Mesh
) -> dict[int, float]:
    """Nats a token of the same validation tokens, by how many times `cfg.context` is read at once.

    A window predicts its last `cfg.context` tokens. The first window begins in the training text.
    """
    tokens, found = text.valid[: cfg.tokens], {}
    for times in cfg.times:
        length, changes = times * cfg.context, {"rope": stretch(cfg.context, float(times))}
        changes |= {"max_length": length} if kind == "learned" else {}
        model = model_of(cfg, kind, text.tokenizer.vocab_size, **changes)
        reader = texts.make_reader(model, length, devices)
        nats = reader(lengthened(params, length), text.train, tokens, cfg.context)
        found[times] = nats / len(tokens)
    return found


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Nats against the length, a line for each way of reading."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, times = figure.add_subplot(), report["config"]["times"]
    for name, nats in report["nats"].items():
        style = "s--" if "," in name and "RoPE" in name else "o-"
        axes.plot(times, list(nats.values()), style, ms=4, label=name)
    axes.set(xscale="log", xlabel=f"length, times the {report['config']['context']} trained on")
    axes.set_xticks(times, [f"{x}×" for x in times])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("nats a character, the same ones at each length")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def main(cfg: Config) -> None:
    """Trains each model and reads with it; prints the table, writes the report and the picture."""
    run.enable_compile_cache()
    begin, devices = time.monotonic(), mesh.make("data=1")
    text = texts.load(cfg.data, least=max(cfg.times) * cfg.context + 1)
    report: dict[str, Any] = {"config": dataclasses.asdict(cfg), "nats": {}, "seconds": {}}
    print(f"{'nats a character at':30}" + "".join(f"{f'{x}×':>8}" for x in cfg.times))
    with run.Run(cfg.run) as record:
        for kind in cfg.positions:
            began = time.monotonic()
            model = model_of(cfg, kind, text.tokenizer.vocab_size)
            params = train(cfg, model, text, devices)
            report["seconds"][kind] = round(time.monotonic() - began)
            for name, stretch in ropes(kind).items():
                nats = read(cfg, kind, stretch, params, text, devices)
                report["nats"][name] = nats
                print(f"{name:30}" + "".join(f"{x:8.3f}" for x in nats.values()), flush=True)
        record.report(report)
        draw(report, record.folder / "length_extrapolation.png")
        print(f"{time.monotonic() - begin:.0f} s; picture and report: {record.folder}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (texts.TextError, run.TrainingDiverged, run.FolderInUse) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
