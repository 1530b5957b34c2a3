"""Losses of a student that follows a teacher's soft classes, and what makes classes of its logits.

A teacher's logits become targets by `centred_softmax` or by `sinkhorn`; targets carry no gradient.
Arithmetic and results are float32 (float64 for such inputs). A teacher's temperature is usually
warmed up: `optax.linear_schedule(0.04, 0.07, steps)`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.ops import losses
from jaxformer.typing import Array, Bool, Float


def dino_loss(
    logits: Float[Array, "views B V"],
    targets: Float[Array, "taught B V"],
    *,
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """Averages the cross-entropy over all pairs of a student's and a teacher's view but like ones.

    The teacher sees the student's first views (the large crops): view `i` of the student learns
    from every view of the teacher but `i`.

    Args:
        logits: The student's, of each of its views of B images.
        targets: The teacher's classes of the first of these views; each sums to 1.
        temperature: Of the student.

    Raises:
        ValueError: If the teacher has more views than the student, or there is no pair.

    References:
        Caron et al. 2021, "Emerging properties in self-supervised vision transformers", eq. 3.
        https://arxiv.org/abs/2104.14294 (a sum over pairs there, a mean here as in its code).
    """
    views, taught = logits.shape[0], targets.shape[0]
    if not 1 <= taught <= views or views == 1:
        raise ValueError(f"dino_loss pairs no views: {views} of the student, {taught} taught.")
    log_p = jax.nn.log_softmax(_widen(logits) / temperature, axis=-1)
    targets = lax.stop_gradient(_widen(targets))
    entropies = -jnp.einsum("tbv,sbv->ts", targets, log_p, precision="highest") / logits.shape[1]
    return jnp.where(jnp.eye(taught, views, dtype=bool), 0, entropies).sum() / (
        taught * (views - 1)
    )


def ibot_loss(
    logits: Float[Array, "B P V"],
    targets: Float[Array, "B P V"],
    hidden: Bool[Array, "B P"],
    *,
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """Averages the cross-entropy over each image's hidden patches, and these means over images.

    An image without hidden patches counts as 0. The P patches need not be all of an image: only
    some may have been gathered, and then `hidden` tells them from padding.

    Args:
        logits: The student's, who saw a mask in place of the hidden patches.
        targets: The teacher's classes, who saw the patches; each sums to 1.
        hidden: Which patches count; of the others, values and gradients are nothing, NaN included.
        temperature: Of the student.

    References:
        Zhou et al. 2022, "iBOT", eq. 2. https://arxiv.org/abs/2111.07832
        Oquab et al. 2024, "DINOv2", section 4. https://arxiv.org/abs/2304.07193
    """
    logits = jnp.where(hidden[..., None], _widen(logits), 0)
    targets = lax.stop_gradient(jnp.where(hidden[..., None], _widen(targets), 0))
    entropies = -(targets * jax.nn.log_softmax(logits / temperature, axis=-1)).sum(axis=-1)
    return jax.vmap(losses.masked_mean)(entropies, hidden).mean()


def centred_softmax(
    logits: Float[Array, "*B V"], centre: Float[Array, "V"], temperature: Float[Array, ""] | float
) -> Float[Array, "*B V"]:
    """Makes a teacher's targets: the softmax of what remains of the logits without their centre.

    References:
        Caron et al. 2021, eq. 1 and section 3.1. https://arxiv.org/abs/2104.14294
    """
    centre = _widen(centre).reshape((1,) * (logits.ndim - 1) + (-1,))
    return lax.stop_gradient(jax.nn.softmax((_widen(logits) - centre) / temperature, axis=-1))


def update_centre(
    centre: Float[Array, "V"], logits: Float[Array, "*B V"], *, momentum: float = 0.9
) -> Float[Array, "V"]:
    """Moves the centre towards the mean of the teacher's logits, over all axes but the last.

    References:
        Caron et al. 2021, eq. 4. https://arxiv.org/abs/2104.14294
    """
    mean = _widen(logits).mean(axis=tuple(range(logits.ndim - 1)))
    return lax.stop_gradient(momentum * centre + (1 - momentum) * mean)


def sinkhorn(
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""] | float,
    *,
    where: Bool[Array, "B"] | None = None,
    iterations: int = 3,
) -> Float[Array, "B V"]:
    """Makes a teacher's targets that use all classes alike: rows sum to 1, columns to nearly B / V.

    It alternately scales the columns and the rows of `exp(logits / temperature)`, as logarithms, so
    that no logit overflows. The whole batch takes part, on whatever devices of one `jit` its rows
    lie; under `pmap` each device balances its own.

    Args:
        logits: The teacher's.
        temperature: Of the teacher.
        where: Rows that count, all if None; the others become 0, whatever they hold.
        iterations: How often both are scaled, rows last; more make the columns more alike.

    Raises:
        ValueError: If `iterations` is not positive.

    References:
        Caron et al. 2020, "SwAV", section 3.1 and appendix A. https://arxiv.org/abs/2006.09882
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn needs iterations >= 1, got {iterations}.")
    where = jnp.ones(logits.shape[:1], bool) if where is None else where
    counted = (where | ~where.any())[:, None]  # of no rows a sum's logarithm is infinite

    def scale(_: Array, log_q: Array) -> Array:
        log_q -= jax.nn.logsumexp(log_q, axis=0, keepdims=True, where=counted)
        return log_q - jax.nn.logsumexp(log_q, axis=1, keepdims=True)

    logits = lax.stop_gradient(_widen(logits))
    log_q = lax.fori_loop(0, iterations, scale, jnp.where(where[:, None], logits / temperature, 0))
    return jnp.where(where[:, None], jnp.exp(log_q), 0)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
