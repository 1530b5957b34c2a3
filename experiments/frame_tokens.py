"""Frames of a ball as tokens: trains the tokenizer, and lays frames and actions in one sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import ball
from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ViTCoder, VQVAEConfig
from jaxformer.tokenizers.vq import VQTokenizer
from jaxformer.training import data, loop, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step
from jaxformer.typing import Array, Int, PyTree


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and its training.

    Attributes:
        patch: Side in pixels of what a token stands for; the others tell of it too.
        levels: Of the finite scalars; their product is the number of tokens.
        coder: Sizes of encoder and decoder.
        steps: Training steps.
        batch: Frames a step.
        learning_rate: Peak.
    """

    patch: int = 8
    levels: tuple[int, ...] = (8, 6, 5)
    coder: ViTCoder = ViTCoder(hidden=128)  # its norms spread the vectors of such dark frames
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3

    def model(self, side: int) -> VQVAE:
        """Makes the model for square frames."""
        return VQVAE(
            VQVAEConfig((side, side), 1, self.patch, self.coder), quantize.FSQ(self.levels)
        )


def train(
    cfg: TokenizerConfig, box: ball.Box, states: np.ndarray, seed: int, devices: Mesh, folder: str
) -> VQTokenizer | None:
    """Trains a tokenizer of frames to the end, or until a signal; returns None after a signal.

    Args:
        cfg: Of the tokenizer.
        box: What the frames show.
        states: A ball each, a row each.
        seed: Of everything random.
        devices: To train on.
        folder: For the run.
    """
    model, key = cfg.model(box.side), jax.random.key(seed)
    frames = ball.render(box, jnp.asarray(states[:1024, :2]))
    variance = float(frames.var())

    def loss(params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict]:
        found: Any = model.apply(params, ball.render(box, batch["states"][:, :2]), train=True)
        terms = {"distortion": found.distortion, "perplexity": found.perplexity}
        return found.distortion / variance + found.quantizer_loss, terms

    warmup = min(100, cfg.steps - 1)
    rate = optimizers.warmup_cosine(cfg.learning_rate, cfg.steps, warmup=warmup)
    optimizer = optimizers.adamw(rate, weight_decay=0.0)
    meaning = dataclasses.asdict(cfg) | {"box": dataclasses.asdict(box), "seed": seed}
    with run.Run(folder) as record:
        last = loop.train(
            TrainState.create(jax.jit(model.init)(key, frames[:1]), optimizer, key),
            jit_step(make_train_step(loss, optimizer), devices),
            data.InMemory({"states": states}, cfg.batch, seed),
            record,
            steps=cfg.steps,
            config=cfg,
            meaning=meaning,
            units_per_step=cfg.batch,
            unit="frames",
        )
    return None if last is None else VQTokenizer(model, jax.device_get(last.params))


def to_sequence(
    ids: Int[np.ndarray, "B T P"], actions: Int[np.ndarray, "B T"], vocab_size: int
) -> Int[np.ndarray, "B T*(P+1)"]:
    """Lays the tokens of each frame, then its action, one moment after the other.

    Args:
        ids: Of frames, below `vocab_size`.
        actions: Token `vocab_size + action`.
        vocab_size: E, of the frames' tokens.
    """
    moments = np.concatenate([ids, vocab_size + actions[..., None]], axis=-1)
    return moments.reshape(len(ids), -1).astype(np.int32)
