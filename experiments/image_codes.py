"""Tokenizers for experiments on the codes of images: trained on images of any size, or loaded."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import vision
from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ConvCoder, VQVAEConfig
from jaxformer.tokenizers import vq
from jaxformer.tokenizers.vq import VQTokenizer
from jaxformer.training import data, loop, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step
from jaxformer.typing import Array, Float, PyTree, UInt8


class CodesError(ValueError):
    """A folder holds no tokenizer, or one for other images."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a tokenizer of finite scalars is trained.

    Attributes:
        levels: Of the scalars; their product is the number of codes.
        patch: Side in pixels of what a code stands for.
        conv: Sizes of encoder and decoder.
        steps: Training steps.
        batch: Images a step, of all devices together.
        learning_rate: Peak.
    """

    levels: tuple[int, ...] = (5, 5, 4)
    patch: int = 4
    conv: ConvCoder = ConvCoder(width=32, hidden=16)
    steps: int = 800
    batch: int = 64
    learning_rate: float = 3e-3

    def model(self, size: tuple[int, int], channels: int) -> VQVAE:
        """The model that is trained."""
        return VQVAE(VQVAEConfig(size, channels, self.patch, self.conv), quantize.FSQ(self.levels))


def ready(
    saved: str,
    cfg: Config,
    folder: pathlib.Path,
    images: UInt8[np.ndarray, "n height width C"],
    seed: int,
    devices: Mesh,
) -> VQTokenizer | None:
    """Loads the tokenizer from the folder `saved`, or trains one if that is ""; see `train`.

    Raises:
        CodesError: If the folder holds none, or one for other images.
    """
    if not saved:
        return train(cfg, folder, images, seed, devices)
    try:
        found = vq.load(saved)
    except (OSError, ValueError) as error:
        raise CodesError(error) from error
    if found.size != images.shape[1:]:
        raise CodesError(f"{saved} is for images of {found.size}, got {images.shape[1:]}.")
    return found


def train(
    cfg: Config,
    folder: pathlib.Path,
    images: UInt8[np.ndarray, "n height width C"],
    seed: int,
    devices: Mesh,
) -> VQTokenizer | None:
    """Trains in a run folder of its own, where it goes on; returns None after a signal.

    The folder then holds the tokenizer, as `tokenizers.vq.load(folder / "tokenizer")` reads it.
    """
    model = cfg.model(images.shape[1:3], images.shape[3])
    found = fit(
        model,
        cfg,
        {"images": images},
        lambda batch: vision.light(batch["images"]),
        float(np.var(images / np.float32(255))),
        seed,
        devices,
        folder,
        meaning=dataclasses.asdict(cfg) | {"seed": seed},
        log_every=100,
    )
    if found is None:
        return None
    found.save(folder / "tokenizer")
    return vq.load(folder / "tokenizer")


def fit(
    model: VQVAE,
    cfg: Any,
    arrays: dict[str, np.ndarray],
    draw: Callable[[PyTree], Float[Array, "B height width C"]],
    variance: float,
    seed: int,
    devices: Mesh,
    folder: str | os.PathLike[str],
    **options: Any,
) -> VQTokenizer | None:
    """Trains a tokenizer to the end, or until a signal; returns None after a signal.

    Args:
        model: Whose quantiser draws nothing and keeps nothing, such as FSQ.
        cfg: With `steps`, `batch` and `learning_rate`, for the run's `config.json`.
        arrays: What batches are rows of.
        draw: Makes the images of a batch, from 0 to 1.
        variance: Of these, of which the error is told as a share.
        seed: Of everything random.
        devices: To train on.
        folder: For the run.
        **options: For `loop.train`.
    """

    def loss(params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict]:
        found: Any = model.apply(params, draw(batch), train=True)
        figures = {"distortion": found.distortion, "perplexity": found.perplexity}
        return found.distortion / variance + found.quantizer_loss, figures

    warmup = min(100, cfg.steps - 1)
    rate = optimizers.warmup_cosine(cfg.learning_rate, cfg.steps, warmup=warmup)
    optimizer = optimizers.adamw(rate, weight_decay=0.0)
    key, size = jax.random.key(seed), (*model.config.size, model.config.channels)
    params = jax.jit(model.init)(key, jnp.zeros((1, *size)))
    with run.Run(folder) as record:
        last = loop.train(
            TrainState.create(params, optimizer, key),
            jit_step(make_train_step(loss, optimizer), devices),
            data.InMemory(arrays, cfg.batch, seed),
            record,
            steps=cfg.steps,
            config=cfg,
            units_per_step=cfg.batch,
            **options,
        )
    return None if last is None else VQTokenizer(model, jax.device_get(last.params))
