r"""Learns handwritten digits token by token, writes new ones of any class, and says what it knows.

    python -m experiments.ar_mnist                                   10 minutes on two CPU cores
    python -m experiments.ar_mnist --steps 1000 --run runs/demo      what `make demo` runs
    python -m experiments.ar_mnist --data tfds:DIR --binarisation dynamic --steps 12000 \
        --batch 256 --model.width 384 --model.num-layers 10 --model.num-heads 6 \
        --model.hidden 1536 --model.dropout 0.1 --compute-dtype bfloat16       full MNIST, one GPU

An image is 196 tokens of 2×2 binary pixels after a class token. The report gives nats per image on
test digits, given the class and without (the sum over all classes, ten passes), the accuracy of
`argmax p(class | image)`, the share of 1,000 new digits that an independent reader reads as the
class asked for, and the speed of writing. The same command goes on where it was stopped. Expected
with the defaults: at most 57 nats given the class; the README has the table.
"""

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from experiments import ar_mnist_report as report
from experiments import digit_reader
from jaxformer.models import image_gpt
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.ops import linear, losses
from jaxformer.ops.attention import blocked
from jaxformer.training import checkpoint, data, loop, mesh, mnist, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step, pmap_step


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        run: Folder of the run; a run that was stopped goes on from its last checkpoint.
        data: "embedded", "tfds:DIR", or a folder with the four IDX files of MNIST.
        binarisation: Ink where a pixel exceeds 127, or drawn anew with its probability at each use.
        model: Sizes of the model.
        steps: Training steps.
        batch: Images a step, of all devices together.
        optimizer: Of the hidden matrices; everything else has AdamW.
        learning_rate: Peak, for Muon.
        adam_learning_rate: Peak, for AdamW.
        weight_decay: Of all matrices.
        distort: Strength of the random turns, slants and shifts of training images; 0 for none.
        warmup: Steps to the peak.
        ema: Decay of the average of the parameters that is evaluated.
        accumulate: Parts a batch is cut into, to save memory.
        compute_dtype: Of the model's arithmetic; parameters and optimizer are float32.
        seed: Of everything random.
        mesh: Devices, such as "data=8"; simulated on a CPU. By default all that divide the batch.
        step: How the step is spread over devices.
        distributed: Joins the other processes of a TPU slice or a cluster's job.
        save_every: Steps between checkpoints.
        log_every: Steps between lines.
        profile: Trace steps 10 to 15 into the run folder, for TensorBoard or xprof.
    """

    run: str = "runs/ar_mnist"
    data: str = "embedded"
    binarisation: Literal["threshold", "dynamic"] = "threshold"
    model: ImageGPTConfig = ImageGPTConfig()
    steps: int = 4000
    batch: int = 32
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    weight_decay: float = 0.1
    distort: float = 0.3
    warmup: int = 100
    ema: float = 0.995
    accumulate: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    mesh: str | None = None
    step: Literal["jit", "pmap"] = "jit"
    distributed: bool = False
    save_every: int = 500
    log_every: int = 50
    profile: bool = False

    def __post_init__(self) -> None:
        run.check_least(self, steps=1, batch=1, accumulate=1, save_every=1, log_every=1)
        if self.mesh is not None:
            mesh.parse(self.mesh)
        if self.distributed and self.step == "pmap":
            raise ValueError("step=pmap is for one process; with distributed, use step=jit.")

    def meaning(self) -> dict:
        """The settings that the numbers of a checkpoint depend on."""
        how = ("run", "data", "mesh", "step", "distributed", "save_every", "log_every", "profile")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in how}


def source(cfg: Config, digits: mnist.Digits) -> data.Source:
    """Batches of grey images and labels."""
    arrays = {"images": digits.train_images, "labels": digits.train_labels}
    return data.InMemory(arrays, cfg.batch, cfg.seed, jax.process_index(), jax.process_count())


def make_loss(cfg: Config, model: ImageGPT):
    """Nats per image, given the class, of distorted and binarised images."""

    def loss(params, batch, key):
        move, draw, drop = jax.random.split(key, 3)
        ink = batch["images"].astype(jnp.float32) / 255
        ink = digit_reader.distort(move, ink, cfg.distort) if cfg.distort else ink
        level = 0.5 if cfg.binarisation == "threshold" else jax.random.uniform(draw, ink.shape)
        cells = image_gpt.to_tokens((ink > level).astype(jnp.int32), cfg.model)
        tokens = image_gpt.with_class(batch["labels"], cells, cfg.model)
        logits: Any = model.apply(params, tokens, train=True, rngs={"dropout": drop})
        return losses.cross_entropy(logits, cells).sum(-1).mean(), {}

    return loss


def make_optimizer(cfg: Config):
    """Clipping, the optimizer, and its schedule."""

    def peak(rate):
        return optimizers.warmup_cosine(rate, cfg.steps, warmup=min(cfg.warmup, cfg.steps - 1))

    adam, clip = peak(cfg.adam_learning_rate), float(cfg.model.cells)  # the loss sums over cells
    if cfg.optimizer == "adamw":
        return optimizers.adamw(adam, weight_decay=cfg.weight_decay, clip_norm=clip)
    muon = peak(cfg.learning_rate)
    return optimizers.muon(muon, adam, weight_decay=cfg.weight_decay, clip_norm=clip)


def train(cfg: Config, model: ImageGPT, digits: mnist.Digits, devices, record: run.Run):
    """Trains to the end, or until a signal; returns the state, or None after a signal."""
    optimizer, batches = make_optimizer(cfg), source(cfg, digits)

    @jax.jit
    def create(key):
        start = jnp.full((1, cfg.model.cells), cfg.model.vocab_size, jnp.int32)
        return TrainState.create(model.init(key, start), optimizer, key, ema=True)

    state = create(jax.random.key(cfg.seed))
    numbers = {"accumulate": cfg.accumulate, "compute_dtype": cfg.compute_dtype}
    pure = make_train_step(make_loss(cfg, model), optimizer, ema_decay=cfg.ema, **numbers)
    step_fn = (jit_step if cfg.step == "jit" else pmap_step)(pure, devices)
    return loop.train(
        state,
        step_fn,
        batches,
        record,
        steps=cfg.steps,
        config=cfg,
        meaning=cfg.meaning(),
        units_per_step=cfg.batch,
        save_every=cfg.save_every,
        log_every=cfg.log_every,
        profile=(10, 15) if cfg.profile else None,
    )


def main(cfg: Config) -> int:
    """Trains, evaluates, samples; returns the exit status."""
    if cfg.distributed:
        jax.distributed.initialize()
    mesh.keep_host_memory()
    devices = mesh.make(cfg.mesh, batch=cfg.batch // cfg.accumulate)
    run.enable_compile_cache()
    digits = mnist.load(cfg.data)
    writer = reader = ImageGPT(cfg.model)
    if jax.default_backend() == "cpu":
        reader = ImageGPT(cfg.model, blocked.attend_causal, linear.project_input_first)
    with run.Run(cfg.run) as record:
        state = train(cfg, reader, digits, devices, record)
        if state is None:
            return 0
        figures, new = report.evaluate(
            reader, writer, state.best_params, digits, cfg.binarisation, cfg.seed, devices
        )
        if jax.process_index() == 0:
            record.report({"data": digits.origin, "steps": cfg.steps} | figures)
            report.show(record.folder, new)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (run.TrainingDiverged, run.FolderInUse, checkpoint.CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
