"""Writing digits with the key-value cache against computing the whole sequence again for each cell.

    python -m benchmarks.sampling              three minutes on two CPU cores

Both draw with the same keys and must write the same digits before anything is timed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from experiments import ar_mnist_report
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.ops import linear
from jaxformer.ops.attention import blocked
from jaxformer.training import mesh
from jaxformer.training.step import place


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        batch: Digits written together.
        rounds: Timings of each.
    """

    batch: int = 100
    rounds: int = 3


def main(cfg: Config) -> None:
    """Checks, times and prints."""
    mesh.keep_host_memory()
    devices = mesh.make()
    config = ImageGPTConfig.mnist()
    writer = reader = ImageGPT(config)
    if jax.default_backend() == "cpu":
        reader = ImageGPT(config, blocked.attend_causal, linear.project_input_first)
    start = jnp.full((1, config.cells), config.vocab_size)
    params = record.perturbed(writer.init(jax.random.key(0), start))
    classes = place(np.arange(cfg.batch, dtype=np.int32) % config.num_classes, devices)
    fast, slow = ar_mnist_report.make_writer(writer), ar_mnist_report.make_slow_writer(reader)
    key = jax.random.key(2)

    work = {
        "cache": lambda: np.asarray(fast(params, classes, key)),
        "no_cache": lambda: np.asarray(slow(params, classes, key, config.cells)),
    }
    same = (work["cache"]() == work["no_cache"]()).mean()
    if same < 0.999:  # a draw may fall on the edge between two cells, and all after it differ
        raise SystemExit(f"only {same:.2%} of the cells are the same with the cache and without")
    seconds = record.interleaved(work, rounds=cfg.rounds)
    for name, each in seconds.items():
        ratio = float(np.median(np.array(each) / np.array(seconds["cache"])))
        figures = {"images_per_second": round(cfg.batch / float(np.median(each)), 2)}
        figures |= {"time_of_cached": round(ratio, 2), "same_cells": float(same)}
        record.report(f"sampling/{name}", figures | record.spread(each))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
