"""A training step of a Llama against transformers on PyTorch, weights, texts and AdamW the same.

    python -m benchmarks.lm_step                    needs torch and transformers; two minutes

Both losses must fall alike over the first steps before anything is timed; both are timed in turn in
one process, whose allocator keeps its memory as that of the experiments does.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer.models.decoder import Decoder
from jaxformer.models.skeleton import fastest
from jaxformer.ops import losses
from jaxformer.training import mesh


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        width: D.
        layers: Blocks.
        heads: N, of 64 channels; half as many of keys and values.
        hidden: F.
        vocab_size: V.
        batch: Texts.
        length: Tokens of a text.
        rounds: Timings of each.
    """

    width: int = 512
    layers: int = 4
    heads: int = 8
    hidden: int = 1408
    vocab_size: int = 4096
    batch: int = 4
    length: int = 256
    rounds: int = 5


def main(cfg: Config) -> None:
    """Prints one line of JSON for each."""
    import torch

    mesh.keep_host_memory()  # of both
    theirs, model, params = record.llama_of_both(cfg)
    theirs.train()
    model = Decoder(model.config, *fastest(model.config, causal=True))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (cfg.batch, cfg.length))
    tokens, given = jnp.asarray(ids), torch.tensor(ids)

    def loss_of(params):
        logits: Any = model.apply(params, tokens)
        return losses.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()

    sides = (loss_of, params, lambda: theirs(given, labels=given).loss, theirs.parameters())
    record.race("lm_step", *sides, rounds=cfg.rounds, count=cfg.batch * cfg.length, unit="tokens")


if __name__ == "__main__":
    main(tyro.cli(Config))
