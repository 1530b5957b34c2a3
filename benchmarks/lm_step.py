"""A training step of a Llama against transformers on PyTorch, weights, texts and AdamW the same.

    python -m benchmarks.lm_step                    needs torch and transformers; two minutes

Both losses must fall alike over the first steps before anything is timed; both are timed in turn in
one process, whose allocator keeps its memory as that of the experiments does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    optimizer = optax.adamw(1e-3, weight_decay=0.01)

    def loss_of(params):
        logits: Any = model.apply(params, tokens)
        return losses.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    now = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)

    def ours() -> float:
        now[0], now[1], loss = step(*now)
        return float(loss)

    def of_torch() -> float:
        loss = theirs(given, labels=given).loss
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        return float(loss.detach())

    for _ in range(3):
        np.testing.assert_allclose(ours(), of_torch(), rtol=1e-3)
    runs = {"jaxformer": ours, "transformers": of_torch}
    seconds = record.interleaved(runs, rounds=cfg.rounds, settle=True)
    mine = np.median(seconds["jaxformer"])
    for name, times in seconds.items():
        figures = {
            "of": name,
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "tokens_per_second": round(cfg.batch * cfg.length / float(np.median(times)), 1),
            "jaxformer_is_faster_by": round(float(np.median(times) / mine), 2),
        }
        record.report("lm_step", figures | record.spread(times), ("transformers", "torch"))


if __name__ == "__main__":
    main(tyro.cli(Config))
