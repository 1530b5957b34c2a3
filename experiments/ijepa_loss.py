"""What a JEPA hides and what it is trained to tell: a part of `experiments/ijepa.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import vision
from jaxformer.models.jepa import JEPA
from jaxformer.ops import (
    attention,
    block_masks,
    losses,
    norms,
    patch_masks,
    reconstruction,
    spreading,
)
from jaxformer.training import data
from jaxformer.training.state import TrainState
from jaxformer.typing import Array, PyTree


def hide(
    grid: tuple[int, ...],
) -> Callable[[data.Batch, np.random.Generator], data.Batch]:
    """Makes a transform of batches, which draws what each image shows and the blocks to predict."""

    def transform(batch: data.Batch, random: np.random.Generator) -> data.Batch:
        size = (grid[0], grid[1])
        drawn = block_masks.multi_block(random, len(batch["images"]), size, size[0] * size[1] // 2)
        return batch | drawn._asdict()

    return transform


def make_loss(model: JEPA, variance: float, covariance: float):
    """Smooth error of what is told of each block about the teacher's vectors there, normalised.

    Each block is predicted by itself. Indices that stand for no patch are read as the last one, and
    nobody may look there.

    Args:
        model: The encoder and the predictor.
        variance: Weight of a term that keeps the means of what is shown of images apart.
        covariance: Weight of a term that keeps the channels of these means from saying the same.
    """
    prefix = model.config.encoder.prefix

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply(params, *args, **kwargs)

    def loss(params: PyTree, batch: PyTree, key: Array, state: TrainState) -> tuple[Array, Any]:
        x = vision.centred(vision.light(batch["images"]))
        shown, targets = batch["shown"], batch["targets"]
        blocks = targets.shape[1]
        wanted = norms.layer_norm(apply(state.ema, x, method="encode")[:, prefix:])
        last = wanted.shape[1] - 1
        of_targets = patch_masks.gather_patches(wanted, targets.reshape(len(x), -1))

        real, keep = shown <= last, jnp.minimum(shown, last)
        may = attention.key_lengths(prefix + real.sum(axis=1))
        drop, drop_told = ({"dropout": k} for k in jax.random.split(key))
        seen = apply(params, x, may, keep=keep, train=True, rngs=drop, method="encode")
        total = jnp.where(real[..., None], seen[:, prefix:], 0).sum(axis=1)
        mean = total / real.sum(axis=1, keepdims=True)
        seen, keep, shown = (jnp.repeat(a, blocks, axis=0) for a in (seen, keep, shown))
        aims = targets.reshape(len(seen), -1)
        tokens = jnp.pad(jnp.concatenate([shown, aims], axis=1), ((0, 0), (prefix, 0)))
        may = attention.explicit((tokens <= last)[:, None, None])
        how = {"train": True, "rngs": drop_told, "method": "predict"}
        told = apply(params, seen, keep, jnp.minimum(aims, last), may, **how)
        error = reconstruction.smooth_l1(told, of_targets.reshape(told.shape))
        terms = {
            "error": losses.masked_mean(error, aims <= last),
            "variance": spreading.variance_term(mean),
            "covariance": spreading.covariance_term(mean),
        }
        apart = variance * terms["variance"] + covariance * terms["covariance"]
        return terms["error"] + apart, (terms, state.extra)

    return loss
