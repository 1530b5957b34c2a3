"""Tokens a second of greedy decoding against transformers on PyTorch, weights and texts the same.

    python -m benchmarks.decode                     needs torch and transformers; two minutes

A Llama of 25 million parameters in float32 with weights drawn at random goes through a folder from
transformers to us; texts must be the same token for token before anything is timed; both are timed
in turn in one process, prompt included.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer.generation import decode, samplers


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        width: D.
        layers: Blocks.
        heads: N, of 64 channels; half as many of keys and values.
        hidden: F.
        vocab_size: V.
        batches: Texts at a time.
        prompt: Tokens of a prompt.
        steps: New tokens.
        rounds: Timings of each.
    """

    width: int = 512
    layers: int = 7
    heads: int = 8
    hidden: int = 1408
    vocab_size: int = 8192
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 32
    steps: int = 96
    rounds: int = 5


def main(cfg: Config) -> None:
    """Prints one line of JSON for each way and batch."""
    import torch

    # So large that texts do not repeat a token.
    theirs, model, params = record.llama_of_both(cfg, initializer_range=0.06)
    theirs.eval()
    size = sum(x.size for x in jax.tree.leaves(params))

    def write(params, prompt):
        return decode.generate(
            functools.partial(model.apply, params),
            model.empty_cache(prompt.shape[0], cfg.prompt + cfg.steps),
            prompt,
            steps=cfg.steps,
            sample=samplers.greedy(),
            key=jax.random.key(0),
        )

    ours = jax.jit(write)
    for batch in cfg.batches:
        ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, cfg.prompt))
        prompt, given = jnp.asarray(ids), torch.tensor(ids)

        def of_torch(given=given):
            with torch.no_grad():
                return theirs.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=cfg.steps,
                    min_new_tokens=cfg.steps,
                    do_sample=False,
                    pad_token_id=0,
                ).numpy()

        def of_us(prompt=prompt):
            return np.asarray(ours(params, prompt))

        np.testing.assert_array_equal(of_us(), of_torch())
        runs = {"jaxformer": of_us, "transformers": of_torch}
        seconds = record.interleaved(runs, rounds=cfg.rounds, settle=True)
        mine = np.median(seconds["jaxformer"])
        for name, times in seconds.items():
            figures = {
                "of": name,
                "parameters": size,
                "batch": batch,
                "tokens_per_second": round(batch * cfg.steps / float(np.median(times)), 1),
                "jaxformer_is_faster_by": round(float(np.median(times) / mine), 2),
            }
            record.report("decode", figures | record.spread(times), ("transformers", "torch"))


if __name__ == "__main__":
    main(tyro.cli(Config))
