r"""Learns tokens of images: digits as 49 codes, and the digits again from these.

    python -m experiments.vqvae                                   minutes on two CPU cores
    python -m experiments.vqvae --quantizer vq_ema                codes that follow their inputs
    python -m experiments.vqvae --architecture vit                Transformers over patches

The report gives the mean square error of test digits beside that of k-means of patches with as many
codes, so at the same bits an image, and how evenly the codes are used. The run's folder then holds
the tokenizer, `tokenizers.vq.load(run + "/tokenizer")`, and pictures. The same command goes on
where it was stopped.

With the defaults (seed 0): 0.0022, which is 0.44 of the error of k-means (0.0051), at 387 bits; all
240 codes are in use, with a perplexity of 200.
"""

import dataclasses
import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import digit_reader
from experiments import vqvae_report as report
from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ConvCoder, ViTCoder, VQVAEConfig
from jaxformer.tokenizers.vq import VQTokenizer
from jaxformer.training import checkpoint, data, loop, mesh, mnist, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step, pmap_step
from jaxformer.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        run: Folder of the run; a run that was stopped goes on from its last checkpoint.
        data: "embedded", "tfds:DIR", or a folder with the four IDX files of MNIST.
        quantizer: Codes trained by gradients ("vq") or that follow their inputs ("vq_ema"), finite
            scalars ("fsq"), or a relaxed softmax ("gumbel").
        architecture: Of encoder and decoder.
        levels: Of the finite scalars; of the others the product is the number of codes.
        width: Channels of a code, but for "fsq"; with many, few codes are ever used by "vq".
        conv: Sizes, for "conv".
        vit: Sizes, for "vit".
        patch: Side in pixels of what a code stands for.
        steps: Training steps.
        batch: Images a step, of all devices together.
        learning_rate: Peak.
        warmup: Steps to the peak.
        distort: Strength of the random turns, slants and shifts of training images; 0 for none.
        seed: Of everything random.
        mesh: Devices, such as "data=8"; simulated on a CPU. By default all that divide the batch.
        step: How the step is spread over devices.
        save_every: Steps between checkpoints, and between measurements of the test digits.
        log_every: Steps between lines.
    """

    run: str = "runs/vqvae"
    data: str = "embedded"
    quantizer: Literal["vq", "vq_ema", "fsq", "gumbel"] = "fsq"
    architecture: Literal["conv", "vit"] = "conv"
    levels: tuple[int, ...] = (8, 6, 5)
    width: int = 4
    conv: ConvCoder = ConvCoder()
    vit: ViTCoder = ViTCoder()
    patch: int = 4
    steps: int = 2500
    batch: int = 64
    learning_rate: float = 5e-3
    warmup: int = 100
    distort: float = 0.0
    seed: int = 0
    mesh: str | None = None
    step: Literal["jit", "pmap"] = "jit"
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        run.check_least(self, width=1, steps=1, batch=1, save_every=1, log_every=1)
        self.model()

    def meaning(self) -> dict[str, Any]:
        """The settings that the numbers of a checkpoint depend on."""
        how = ("run", "data", "mesh", "step", "save_every", "log_every")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in how}

    def model(self) -> VQVAE:
        """The model that is trained."""
        codes = (math.prod(self.levels), self.width)
        quantizer = {
            "vq": lambda: quantize.VectorQuantizer(*codes),
            "vq_ema": lambda: quantize.EMAVectorQuantizer(*codes),
            "fsq": lambda: quantize.FSQ(self.levels),
            "gumbel": lambda: quantize.GumbelQuantizer(*codes, divergence=0.001),
        }[self.quantizer]()
        coder = self.conv if self.architecture == "conv" else self.vit
        return VQVAE(VQVAEConfig((28, 28), 1, self.patch, coder), quantizer)


def make_loss(cfg: Config, model: VQVAE, variance: float):
    """Square error as a share of the images' variance, and what the quantiser adds to it."""

    def loss(params, batch, key, state):
        move, draw = jax.random.split(key)
        ink = batch["images"].astype(jnp.float32) / 255
        ink = digit_reader.distort(move, ink, cfg.distort) if cfg.distort else ink
        options = {}
        if cfg.quantizer == "gumbel":  # cools from 1 to 1/16 in three quarters of the training
            done = jnp.minimum(state.step / (0.75 * cfg.steps), 1.0)
            options["temperature"] = 16.0**-done
        found, extra = model.apply(
            {"params": params, **state.extra},
            ink[..., None],
            train=True,
            rngs={"quantizer": draw},
            mutable=["codebook"],
            **options,
        )
        metrics = {"distortion": found.distortion, "perplexity": found.perplexity}
        return found.distortion / variance + found.quantizer_loss, (metrics, extra)

    return loss


def train(cfg: Config, model: VQVAE, digits: mnist.Digits, devices, record: run.Run):
    """Trains to the end, or until a signal; returns the variables, or None after a signal."""
    warmup = min(cfg.warmup, cfg.steps - 1)
    rate = optimizers.warmup_cosine(cfg.learning_rate, cfg.steps, warmup=warmup)
    optimizer = optimizers.adamw(rate, weight_decay=0.0)

    @jax.jit
    def create(key):
        variables = dict(model.init(key, jnp.zeros((1, 28, 28, 1))))
        return TrainState.create(variables.pop("params"), optimizer, key, extra=variables)

    @jax.jit
    def measure(variables, images):
        found: Any = model.apply(variables, images)
        return {"test_distortion": found.distortion, "test_perplexity": found.perplexity}

    variance = float(np.var(digits.train_images / np.float32(255)))
    test = report.ink(digits.test_images[:500])
    pure = make_train_step(make_loss(cfg, model, variance), optimizer, stateful=True)
    last = loop.train(
        create(jax.random.key(cfg.seed)),
        (jit_step if cfg.step == "jit" else pmap_step)(pure, devices),
        data.InMemory({"images": digits.train_images}, cfg.batch, cfg.seed),
        record,
        steps=cfg.steps,
        config=cfg,
        meaning=cfg.meaning(),
        units_per_step=cfg.batch,
        save_every=cfg.save_every,
        log_every=cfg.log_every,
        evaluate=lambda state: measure(variables_of(state), test),
    )
    return None if last is None else jax.device_get(variables_of(last))


def variables_of(state: TrainState) -> PyTree:
    """What the model is applied with."""
    return {"params": state.params, **(state.extra or {})}


def main(cfg: Config) -> int:
    """Trains, measures, draws; returns the exit status."""
    mesh.keep_host_memory()
    devices = mesh.make(cfg.mesh, batch=cfg.batch)
    run.enable_compile_cache()
    digits, model = mnist.load(cfg.data), cfg.model()
    with run.Run(cfg.run) as record:
        variables = train(cfg, model, digits, devices, record)
        if variables is None:
            return 0
        tokenizer = VQTokenizer(model, variables)
        tokenizer.save(record.folder / "tokenizer")
        settings = {"data": digits.origin, "quantizer": cfg.quantizer}
        settings |= {"architecture": cfg.architecture, "steps": cfg.steps}
        report.write(record, settings, tokenizer, digits, (cfg.patch, cfg.patch), cfg.seed)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (run.TrainingDiverged, run.FolderInUse, checkpoint.CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
