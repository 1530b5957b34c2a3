"""Mixtures of experts: who computes what, and how evenly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float, Int


def route_softmax(
    logits: Float[Array, "R E"], count: int
) -> tuple[Float[Array, "R {count}"], Int[Array, "R {count}"]]:
    """Takes the `count` largest logits of each row, and their softmax as weights.

    References:
        Jiang et al. 2024, "Mixtral of experts", section 2.1. https://arxiv.org/abs/2401.04088
    """
    best, chosen = jax.lax.top_k(logits.astype(jnp.float32), count)
    return jax.nn.softmax(best, axis=-1), chosen


def route_sigmoid(
    logits: Float[Array, "R E"],
    count: int,
    correction: Float[Array, "E"],
    *,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    factor: float = 1.0,
) -> tuple[Float[Array, "R {count}"], Int[Array, "R {count}"]]:
    """Takes the `count` best experts of the best groups, with weights by their sigmoids.

    Args:
        logits: Of each row and expert.
        count: Experts of a row.
        correction: Added to the sigmoids where experts are chosen, not where they are weighted.
        groups: Into which experts fall, in order; a group is as good as its best two.
        top_groups: Groups whose experts may be chosen.
        normalize: Whether the weights of a row sum to `factor`.
        factor: Of the weights.

    References:
        DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2. https://arxiv.org/abs/2412.19437
    """
    rows, experts = logits.shape
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    ranked = (scores + correction[None]).reshape(rows, groups, experts // groups)
    best = jax.lax.top_k(ranked, min(2, experts // groups))[0].sum(-1)
    kept = jax.nn.one_hot(jax.lax.top_k(best, top_groups)[1], groups, dtype=bool).any(1)
    ranked = jnp.where(kept[:, :, None], ranked, -jnp.inf).reshape(rows, experts)
    _, chosen = jax.lax.top_k(ranked, count)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * factor, chosen


def mix(
    x: Float[Array, "R D"],
    weights: Float[Array, "R C"],
    chosen: Int[Array, "R C"],
    num_experts: int,
    compute: Callable[[Array, Array, Array], Array],
) -> Float[Array, "R O"]:
    """Sums what the chosen experts make of each row, weighted.

    Rows are sorted by expert, so that each expert's lie together.

    Args:
        x: Rows.
        weights: Of the chosen experts.
        chosen: Experts of each row.
        num_experts: E.
        compute: Takes R·C rows sorted by expert, how many each has, and the expert of each.
    """
    count = chosen.shape[1]
    experts = chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    source = order // count
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    y = compute(x[source], sizes, experts[order])
    y = y * weights.reshape(-1)[order][:, None].astype(y.dtype)
    return jnp.zeros((x.shape[0], y.shape[1]), y.dtype).at[source].add(y)


def load_balance(logits: Float[Array, "R E"], count: int) -> Float[Array, ""]:
    """How unevenly experts are used: `count` if evenly, more if not; it has a gradient.

    E times the sum over experts of the share of rows that choose it and its mean probability. For
    several layers, give their rows together.

    References:
        Fedus et al. 2022, "Switch Transformers", eq. 4 to 6; here with `count` choices a row.
        https://arxiv.org/abs/2101.03961
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, count)
    share = jax.nn.one_hot(chosen, experts).sum(1).mean(0)
    return experts * jnp.sum(share * probabilities.mean(0))
