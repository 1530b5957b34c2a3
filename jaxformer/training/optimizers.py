"""Recipes: gradient clipping, AdamW or Muon with weight decay on matrices, and a schedule.

A stack of blocks that is scanned keeps the parameters of all its layers in one leaf, with a leading
axis, below a module named `layers`; a leaf there counts as a matrix if each layer's part is one.
"""

from typing import Any

import jax
import optax

from jaxformer.typing import PyTree


def warmup_cosine(
    peak: float, steps: int, *, warmup: int = 100, final: float = 0.02
) -> optax.Schedule:
    """Rises linearly to `peak` over `warmup` steps and falls along a cosine to `final * peak`.

    It starts at `peak / warmup`, so that no step is lost, and stays at the end after `steps`.

    Raises:
        ValueError: If `warmup` is negative or leaves nothing of `steps`.

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
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clips, then Muon for the hidden kernels and AdamW for everything else, both with Nesterov.

    A hidden kernel is a leaf named `kernel` below a module named `layers` or `layers_…`: the
    matrices of a stack of blocks, whose own leading axis, where it is scanned, is a batch of
    matrices. Embeddings, heads, norms and biases are AdamW's.

    Args:
        learning_rate: Muon's; an update's singular values are near 1 (0.7 to 1.2), times
            √max(1, O/I) for a kernel of I × O.
        adam_learning_rate: AdamW's.
        weight_decay: On the hidden kernels, and on the other matrices; vectors do not decay.
        b1: AdamW's first decay.
        b2: AdamW's second decay.
        clip_norm: Largest norm of the whole gradient.

    References:
        Jordan et al. 2024, "Muon". https://kellerjordan.github.io/posts/muon/
        Dozat 2016, "Incorporating Nesterov momentum into Adam".
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    hidden = optax.contrib.muon(
        learning_rate, weight_decay=weight_decay, muon_weight_dimension_numbers=_dimensions
    )
    other = optax.adamw(
        adam_learning_rate, b1, b2, weight_decay=weight_decay, mask=_matrices, nesterov=True
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.partition({"hidden": hidden, "other": other}, _groups),
    )


def muon_cosine(
    learning_rate: float, adam_learning_rate: float, steps: int, *, warmup: int = 100
) -> optax.GradientTransformation:
    """`muon` whose two rates follow `warmup_cosine`, with at least one step after the warm-up."""
    warmup = min(warmup, steps - 1)
    rates = (warmup_cosine(x, steps, warmup=warmup) for x in (learning_rate, adam_learning_rate))
    return muon(*rates)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _groups(params: PyTree) -> PyTree:
    def group(path: tuple, x: Any) -> str:
        return "hidden" if _is_hidden_kernel(path, x) else "other"

    return jax.tree_util.tree_map_with_path(group, params)


def _dimensions(params: PyTree) -> PyTree:
    def dimensions(path: tuple, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        kernel = _is_hidden_kernel(path, x)
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if kernel else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _is_hidden_kernel(path: tuple, x: Any) -> bool:
    names = _names(path)
    inside = any(name == "layers" or name.startswith("layers_") for name in names)
    return inside and names[-1] == "kernel" and _is_matrix(path, x)


def _is_matrix(path: tuple, x: Any) -> bool:
    return x.ndim - ("layers" in _names(path)) > 1


def _names(path: tuple) -> list[str]:
    return [str(getattr(part, "key", part)) for part in path]
