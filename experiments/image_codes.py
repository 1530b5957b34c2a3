"""Tokenizers for experiments on the codes of images: trained on images of any size, or loaded."""

import dataclasses
import pathlib
import zlib
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

Draw = Callable[[PyTree, Array], Float[Array, "B height width C"]]


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

    def __post_init__(self) -> None:
        run.check_least(self, steps=1, batch=1)

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
    number = zlib.crc32(images.tobytes())
    with run.Run(folder) as record:
        found = fit(
            cfg.model(images.shape[1:3], images.shape[3]),
            cfg,
            {"images": images},
            lambda batch, _: vision.light(batch["images"]),
            variance(images),
            seed,
            devices,
            record,
            meaning={"seed": seed, "images": number, **dataclasses.asdict(cfg)},
            log_every=100,
        )
    if found is None:
        return None
    found.save(folder / "tokenizer")
    return vq.load(folder / "tokenizer")


def variance(images: UInt8[np.ndarray, "n height width C"]) -> float:
    """The variance of a pixel, from 0 to 1, over images."""
    return float(np.var(images / np.float32(255)))


def make_loss(model: VQVAE, draw: Draw, variance: float, anneal: Callable[[Array], dict[str, Any]]):
    """The square error as a share of the variance, and what the quantiser adds to it; see `fit`."""

    def loss(params: PyTree, batch: PyTree, key: Array, state: TrainState) -> tuple[Array, Any]:
        move, choose = jax.random.split(key)
        found, extra = model.apply(
            {"params": params, **(state.extra or {})},
            draw(batch, move),
            train=True,
            rngs={"quantizer": choose},
            mutable=["codebook"],
            **anneal(state.step),
        )
        figures = {"distortion": found.distortion, "perplexity": found.perplexity}
        return found.distortion / variance + found.quantizer_loss, (figures, extra)

    return loss


def fit(
    model: VQVAE,
    cfg: Any,
    arrays: dict[str, np.ndarray],
    draw: Draw,
    variance: float,
    seed: int,
    devices: Mesh,
    record: run.Run,
    *,
    test: Float[np.ndarray, "n height width C"] | None = None,
    anneal: Callable[[Array], dict[str, Any]] = lambda step: {},
    spread: Callable[..., Any] = jit_step,
    warmup: int = 100,
    **options: Any,
) -> VQTokenizer | None:
    """Trains a tokenizer to the end, or until a signal; returns None after a signal.

    Args:
        model: With any quantiser.
        cfg: With `steps`, `batch` and `learning_rate`, for the run's `config.json`.
        arrays: What batches are rows of.
        draw: Makes the images of a batch, from 0 to 1, with a key for what is random.
        variance: Of these.
        seed: Of everything random.
        devices: To train on.
        record: Of the run.
        test: Images whose error is measured at each checkpoint.
        anneal: Makes options of the quantiser, such as a temperature, from the number of the step.
        spread: What spreads a step over devices, `jit_step` or `pmap_step`.
        warmup: Steps to the peak of the learning rate.
        **options: For `loop.train`.
    """

    @jax.jit
    def measure(variables: PyTree, images: Array) -> dict[str, Array]:
        found: Any = model.apply(variables, images)
        return {"test_distortion": found.distortion, "test_perplexity": found.perplexity}

    rate = optimizers.warmup_cosine(cfg.learning_rate, cfg.steps, warmup=min(warmup, cfg.steps - 1))
    loss = make_loss(model, draw, variance, anneal)
    optimizer = optimizers.adamw(rate, weight_decay=0.0)
    key, size = jax.random.key(seed), (*model.config.size, model.config.channels)
    start = dict(jax.jit(model.init)(key, jnp.zeros((1, *size))))
    if test is not None:
        options["evaluate"] = lambda state: measure(_variables(state), test)
    last = loop.train(
        TrainState.create(start.pop("params"), optimizer, key, extra=start),
        spread(make_train_step(loss, optimizer, stateful=True), devices),
        data.InMemory(arrays, cfg.batch, seed),
        record,
        steps=cfg.steps,
        config=cfg,
        units_per_step=cfg.batch,
        **options,
    )
    return None if last is None else VQTokenizer(model, jax.device_get(_variables(last)))


def _variables(state: TrainState) -> PyTree:
    """What the model is applied with."""
    return {"params": state.params, **(state.extra or {})}
