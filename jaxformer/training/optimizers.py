"""Recipes: gradient clipping, AdamW or Muon with weight decay on matrices, and a schedule."""

import jax
import optax

from jaxformer.typing import PyTree


def warmup_cosine(
    peak: float, steps: int, *, warmup: int = 100, final: float = 0.02
) -> optax.Schedule:
    """Rises linearly to `peak` over `warmup` steps and falls along a cosine to `final * peak`.

    Raises:
        ValueError: If the warm-up is longer than all of the `steps`.

    References:
        Loshchilov and Hutter 2017, "SGDR", eq. 5. https://arxiv.org/abs/1608.03983
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} does not fit into steps={steps}.")
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(1, warmup),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=final * peak,
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clips the whole gradient to `clip_norm`, then AdamW; matrices decay, vectors do not.

    References:
        Loshchilov and Hutter 2019, algorithm 2. https://arxiv.org/abs/1711.05101
        (decay is multiplied by the learning rate, as in all later practice).
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=_matrices),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clips, then Muon for the hidden kernels and AdamW for everything else.

    A hidden kernel is a leaf named `kernel` below a module named `layers` or `layers_…`: the
    matrices of a stack of blocks, whose own leading axis, where it is scanned, is a batch of
    matrices. Embeddings, heads, norms and biases are AdamW's.

    Args:
        learning_rate: Muon's; an update's singular values are near 1, times √max(1, O/I).
        adam_learning_rate: AdamW's.
        weight_decay: On the hidden kernels, and on the other matrices.
        b1: AdamW's first decay.
        b2: AdamW's second decay.
        clip_norm: Largest norm of the whole gradient.

    References:
        Jordan et al. 2024, "Muon". https://kellerjordan.github.io/posts/muon/
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.contrib.muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            adam_learning_rate=adam_learning_rate,
            muon_weight_dimension_numbers=_hidden_kernels,
            weight_decay_mask=_matrices,
        ),
    )


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _hidden_kernels(params: PyTree) -> PyTree:
    def mark(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(part, "key", part)) for part in path]
        inside = any(name == "layers" or name.startswith("layers_") for name in names)
        if not inside or names[-1] != "kernel" or x.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

    return jax.tree_util.tree_map_with_path(mark, params)
