"""Frames of a ball as tokens: trains the tokenizer, and lays frames and actions in one sequence."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import ball, image_codes
from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ViTCoder, VQVAEConfig
from jaxformer.tokenizers.vq import VQTokenizer
from jaxformer.training import run
from jaxformer.typing import Int


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

    def __post_init__(self) -> None:
        run.check_least(self, steps=1, batch=1)

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
    frames = ball.render(box, jnp.asarray(states[:1024, :2]))
    with run.Run(folder) as record:
        return image_codes.fit(
            cfg.model(box.side),
            cfg,
            {"states": states},
            lambda batch, _: ball.render(box, batch["states"][:, :2]),
            float(frames.var()),
            seed,
            devices,
            record,
            meaning=dataclasses.asdict(cfg)
            | {"box": dataclasses.asdict(box), "seed": seed, "frames": len(states)},
            unit="frames",
        )


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
