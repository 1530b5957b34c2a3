r"""Learns to write as a text is written, by characters or by tokens of its own making.

    python -m experiments.text_lm                                 Python's manual, two CPU cores
    python -m experiments.text_lm --data input.txt --minutes 3    text files, .gz too
    python -m experiments.text_lm --data tfds:DIR                 Tiny Shakespeare, prepared
    python -m experiments.text_lm --bpe 512                       byte-level BPE of 512 tokens

The embedded text is the language reference that `help("topics")` shows. The last tenth of a text
is for validation: every token of it is predicted exactly once, from at least three quarters of
`context` tokens before it, which for the first are the end of the training text. Others often cut
it into windows whose first tokens see nothing; the report has that figure too, "in separate
windows". The same command goes on where it was stopped.

Tiny Shakespeare on two CPU cores: 1.501 nats a character after three minutes of training, 635
steps. The 1,500 steps of the defaults give 1.444, and 1.469 in separate windows.
"""

import dataclasses
import json
import pathlib
import sys
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from experiments import texts
from jaxformer.models.decoder import Decoder
from jaxformer.models.skeleton import fastest
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import losses
from jaxformer.training import checkpoint, data, loop, mesh, optimizers, pictures, records, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import Step, jit_step, make_train_step
from jaxformer.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        run: Folder of the run; a run that was stopped goes on from its last checkpoint.
        data: "embedded", "tfds:DIR", or text files, which are joined.
        bpe: Tokens of a BPE that is trained on the training text; 0 for characters.
        model: Sizes of the model; the text settles `vocab_size`.
        context: T; tokens of a window.
        steps: Training steps.
        minutes: Unless 0, settles `steps` by the time that the first ones take.
        batch: Windows a step, of all devices together.
        learning_rate: Peak, for Muon: of the hidden matrices.
        adam_learning_rate: Peak, for AdamW: of everything else.
        warmup: Steps to the peak.
        seed: Of everything random.
        mesh: Devices, such as "data=8"; simulated on a CPU. By default all that divide the batch.
        save_every: Steps between checkpoints, and between readings of the validation text.
        log_every: Steps between lines.
    """

    run: str = "runs/text_lm"
    data: tuple[str, ...] = ("embedded",)
    bpe: int = 0
    model: TransformerConfig = TransformerConfig(
        1, 128, 4, 4, 4, 32, 344, qk_norm=True, tie_embeddings=False
    )
    context: int = 128
    steps: int = 1500
    minutes: float = 0.0
    batch: int = 32
    learning_rate: float = 0.04
    adam_learning_rate: float = 0.006
    warmup: int = 50
    seed: int = 0
    mesh: str | None = None
    save_every: int = 200
    log_every: int = 50

    def __post_init__(self) -> None:
        run.check_least(self, context=4, steps=1, minutes=0, batch=1, save_every=1)

    def meaning(self, text: texts.Text) -> dict[str, Any]:
        """The settings, and a number for the text, that the numbers of a checkpoint depend on."""
        how = ("run", "data", "minutes", "mesh", "save_every", "log_every")
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in how}
        return settings | {"text": zlib.crc32(np.concatenate([text.train, text.valid]).tobytes())}


def begin(
    cfg: Config, model: Decoder, text: texts.Text, devices: Mesh
) -> tuple[TrainState, Step, data.InMemory]:
    """Makes the state before the first step, the step, and its batches: windows in random order."""

    def loss(params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict]:
        now, rngs = batch["tokens"], {"dropout": key}
        logits: Any = model.apply(params, now[:, :-1], train=True, rngs=rngs)
        return losses.cross_entropy(logits, now[:, 1:]).mean(), {}

    rates = (cfg.learning_rate, cfg.adam_learning_rate)
    optimizer = optimizers.muon_cosine(*rates, cfg.steps, warmup=cfg.warmup)
    key = jax.random.key(cfg.seed)
    state = TrainState.create(jax.jit(model.init)(key, jnp.zeros((1, 2), int)), optimizer, key)
    windows = {"tokens": sliding_window_view(text.train, cfg.context + 1)}
    step = jit_step(make_train_step(loss, optimizer), devices)
    return state, step, data.InMemory(windows, cfg.batch, cfg.seed)


def settle(cfg: Config, *start: Any) -> Config:
    """Turns `minutes` into steps: those that the folder tells of, or as many as will fit."""
    told = pathlib.Path(cfg.run, "config.json")
    if told.exists() and (old := json.loads(told.read_text())).get("minutes") == cfg.minutes:
        return dataclasses.replace(cfg, steps=old["steps"])
    (state, step, batches), times = begin(cfg, *start), []
    for count in range(12):
        state, metrics = step(state, batches.batch(count))
        jax.block_until_ready(metrics)
        times.append(time.monotonic())
    each = float(np.median(np.diff(times[1:])))
    return dataclasses.replace(cfg, steps=max(1, int(60 * cfg.minutes / each)))


def train(
    cfg: Config, model: Decoder, text: texts.Text, devices: Mesh, record: run.Run
) -> PyTree | None:
    """Trains to the end, or until a signal; returns the parameters, or None after a signal."""
    state, step_fn, batches = begin(cfg, model, text, devices)
    read = texts.make_reader(model, cfg.context, devices)

    def evaluate(state: TrainState) -> dict[str, float]:
        nats = read(state.params, text.train, text.valid, cfg.context)
        return {"validation": nats / len(text.valid)}

    last = loop.train(
        state,
        step_fn,
        batches,
        record,
        steps=cfg.steps,
        config=cfg,
        meaning=cfg.meaning(text),
        units_per_step=cfg.batch * cfg.context,
        unit="tokens",
        save_every=cfg.save_every,
        log_every=cfg.log_every,
        evaluate=evaluate,
    )
    return None if last is None else last.params


def main(cfg: Config) -> int:
    """Trains, evaluates, writes; returns the exit status."""
    mesh.keep_host_memory()
    devices = mesh.make(cfg.mesh, batch=cfg.batch)
    run.enable_compile_cache()
    text = texts.load(cfg.data, cfg.bpe, least=cfg.context + 1)
    config = dataclasses.replace(cfg.model, vocab_size=text.tokenizer.vocab_size)
    model = Decoder(config, *fastest(config, causal=True))
    cfg = settle(cfg, model, text, devices) if cfg.minutes else cfg
    with run.Run(cfg.run) as record:
        params = train(cfg, model, text, devices, record)
        if params is None:
            return 0
        read = texts.make_reader(model, cfg.context, devices)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        report = {"data": " ".join(cfg.data), "parameters": parameters, "steps": cfg.steps}
        report |= texts.figures(
            text, cfg.context, lambda n: read(params, text.train, text.valid, n)
        )
        record.report(report)
        written = texts.write(
            Decoder(config), jax.device_get(params), text.train, cfg.context, cfg.seed
        )
        samples = "\n\n-----\n\n".join(map(text.tokenizer.decode, written))
        (record.folder / "samples.txt").write_text(samples)
        rows = records.read_metrics(record.folder / "metrics.jsonl")
        curve = {"evaluations": ["validation"], "unit": "nats per token"}
        pictures.loss_curve(rows, record.folder / "loss.png", **curve)
        print(samples, "\n")
        print(records.table(report))
    return 0


if __name__ == "__main__":
    told = (texts.TextError, run.TrainingDiverged, run.FolderInUse, checkpoint.CheckpointError)
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except told as error:
        sys.exit(f"{type(error).__name__}: {error}")
