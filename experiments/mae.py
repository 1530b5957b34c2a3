"""A masked autoencoder learns what images look like: it sees a quarter of each and paints the rest.

    python -m experiments.mae                       the embedded digits, minutes on two CPU cores
    python -m experiments.mae --data tfds:DIR       MNIST, Fashion-MNIST or CIFAR-10, prepared
    python -m experiments.mae --data folder:DIR     PNG and JPEG files

No label is used in training. What the encoder has learned is read from whole images by a linear
probe, and so is what the same encoder gives before any training. The same command goes on where it
was stopped.

Measured with three seeds on the embedded digits: a linear probe tells 95.4 ± 0.7 % of test digits
(73.3 ± 3.9 % untrained, 85.9 % by pixels), 20 nearest neighbours 89.3 ± 0.7 % (43.2 ± 1.1 %,
93.0 %); to encode the 12 shown of 49 patches takes 24.0 % of the operations of all; 4 minutes of
one core's time.

References:
    He et al. 2022, "Masked autoencoders are scalable vision learners".
    https://arxiv.org/abs/2111.06377
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import command, mae_report, trained, vision
from jaxformer.models.mae import MAE, MAEConfig
from jaxformer.models.vit import ViTConfig
from jaxformer.ops import linear, losses, patch_masks, patches, reconstruction
from jaxformer.training import data, images, loop, mesh, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step
from jaxformer.typing import Array, PyTree

_ENCODER = ViTConfig((28, 28), (4, 4), 1, 64, 4, 4, 256, positions="sinusoidal", pool="both")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        run: Folder of the run; a run that was stopped goes on from its last checkpoint.
        data: "embedded" (digits), "tfds:DIR" (prepared sets), "folder:DIR" (PNG and JPEG files,
            in a sub-folder for each class if there are classes) or "npz:FILE".
        size: Height and width to bring images to; 0 for as they are.
        encoder: Sizes of the encoder, whose `pool` is what is read; the data settle `size` and
            `channels`.
        decoder: Width, blocks and heads of the decoder.
        rate: Share of an image's patches that is hidden.
        steps: Training steps.
        batch: Images a step, of all devices together.
        learning_rate: Peak, for Muon: of the hidden matrices.
        adam_learning_rate: Peak, for AdamW: of everything else.
        warmup: Steps to the peak.
        seed: Of everything random.
        mesh: Devices, such as "data=8"; simulated on a CPU. By default all that divide the batch.
        save_every: Steps between checkpoints, and between measurements of the test images.
        log_every: Steps between lines.
    """

    run: str = "runs/mae"
    data: str = "embedded"
    size: int = 0
    encoder: ViTConfig = _ENCODER
    decoder: tuple[int, int, int] = (32, 2, 2)
    rate: float = 0.75
    steps: int = 2000
    batch: int = 100
    learning_rate: float = 0.02
    adam_learning_rate: float = 0.003
    warmup: int = 100
    seed: int = 0
    mesh: str | None = None
    save_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, got {self.rate}.")
        run.check_least(self, steps=1, batch=1, save_every=1, log_every=1)


def make_loss(cfg: Config, model: MAE, train: bool):
    """Square error of the hidden patches, whose pixels are brought to mean 0 and variance 1."""
    encoder = model.config.encoder

    def loss(params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict]:
        pick, drop = jax.random.split(key)
        x = vision.centred(vision.light(batch["images"]))
        split = patch_masks.hide(pick, len(x), math.prod(encoder.grid), rate=cfg.rate)
        rngs = {"dropout": drop}
        told: Any = model.apply(params, x, split.shown, split.hidden, train=train, rngs=rngs)
        wanted = reconstruction.normalised_patches(patches.patchify(x, encoder.patch))
        return losses.masked_mean(reconstruction.squared_error(told, wanted), split.mask), {}

    return loss


def train(
    cfg: Config, model: MAE, seen: images.Images, devices: Mesh, record: run.Run
) -> PyTree | None:
    """Trains to the end, or until a signal; returns the parameters, or None after a signal."""
    rates = (cfg.learning_rate, cfg.adam_learning_rate)
    optimizer = optimizers.muon_cosine(*rates, cfg.steps, warmup=cfg.warmup)
    key, few = jax.random.key(cfg.seed), {"images": jnp.asarray(seen.test_images[:500])}
    encoder = model.config.encoder
    test, params = make_loss(cfg, model, False), vision.create(model, encoder, cfg.seed)
    measure = jax.jit(lambda params: {"test_loss": test(params, few, key)[0]})
    state = loop.train(
        TrainState.create(params, optimizer, key),
        jit_step(make_train_step(make_loss(cfg, model, train=True), optimizer), devices),
        data.InMemory({"images": seen.train_images}, cfg.batch, cfg.seed),
        record,
        steps=cfg.steps,
        config=cfg,
        meaning=vision.meaning(cfg, seen),
        units_per_step=cfg.batch,
        save_every=cfg.save_every,
        log_every=cfg.log_every,
        evaluate=lambda state: measure(state.params),
    )
    return None if state is None else state.params


def main(cfg: Config) -> int:
    """Trains, evaluates, draws; returns the exit status."""
    mesh.keep_host_memory()
    devices = mesh.make(cfg.mesh, batch=cfg.batch)
    run.enable_compile_cache()
    seen = images.load(cfg.data, size=cfg.size or None)
    encoder = vision.settled(cfg.encoder, seen)
    model = MAE(MAEConfig.of(encoder, *cfg.decoder), project=linear.project_input_first)
    with run.Run(cfg.run) as record:
        params = train(cfg, model, seen, devices, record)
        if params is None:
            return 0
        trained.save(record.folder, encoder, params["params"]["encoder"])
        settings = {"data": seen.origin, "parameters": optax.tree.size(params), "steps": cfg.steps}
        sides = params, vision.create(model, encoder, cfg.seed)
        few, count = len(seen.test_images[:10]), math.prod(encoder.grid)
        split = patch_masks.hide(jax.random.key(cfg.seed), few, count, rate=cfg.rate)
        mae_report.write(record, settings, model, sides, seen, split)
    return 0


if __name__ == "__main__":
    command.run(main, Config, __doc__)
