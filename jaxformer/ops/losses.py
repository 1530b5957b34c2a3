"""Losses by position, in nats; the caller takes the mean he means, as with `masked_mean`."""

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    where: Bool[Array, "*B"] | None = None,
) -> Float[Array, "*B"]:
    """Says how surprising each label is: `-log softmax(logits)[label]`, one number a position.

    A label out of `0..V-1` gives NaN, since a traced value cannot raise, and a gradient of NaN.
    Where `where` is False the loss is 0, whatever label and logits say, and so is the gradient, NaN
    included: padding may carry any label.

    Args:
        logits: Unnormalised; the vocabulary is the last axis. Computed in float32.
        labels: Class of each position.
        label_smoothing: Share of the target that is spread evenly over all V classes.
        z_loss: Weight of `log(Z)**2`, which keeps the normaliser Z near 1.
        where: Positions that count; all if None.

    Returns:
        float32 (float64 for such logits), with no mean taken.

    Raises:
        ValueError: If shapes disagree, or `label_smoothing` does not lie in 0..1.

    References:
        Szegedy et al. 2016, "Rethinking Inception", section 7. https://arxiv.org/abs/1512.00567
        Chowdhery et al. 2022, "PaLM", section 5: z-loss. https://arxiv.org/abs/2204.02311
    """
    for name, x in (("labels", labels), ("where", where)):
        if x is not None and x.shape != logits.shape[:-1]:
            raise ValueError(
                f"cross_entropy: {name} have shape {x.shape}, logits {logits.shape} without V."
            )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy needs label_smoothing in 0..1, got {label_smoothing}.")

    vocab = logits.shape[-1]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0)
        labels = jnp.where(where, labels, 0)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A sum over V fuses with the one above and needs no scatter in the gradient, as a gather does.
    at_label = jnp.arange(vocab).reshape((1,) * labels.ndim + (-1,)) == labels[..., None]
    chosen = jnp.where(at_label, logits, 0).sum(axis=-1)
    if label_smoothing:
        chosen = (1 - label_smoothing) * chosen + label_smoothing * logits.mean(axis=-1)
    loss = log_normaliser - chosen
    if z_loss:
        loss = loss + z_loss * jnp.square(log_normaliser)
    loss = loss * jnp.where((labels >= 0) & (labels < vocab), 1, jnp.nan)
    return loss if where is None else jnp.where(where, loss, 0)


def masked_mean(x: Float[Array, "*B"], where: Bool[Array, "*B"] | None = None) -> Float[Array, ""]:
    """Averages in float32 where `where` is True, everywhere if it is None; over nothing it is 0.

    Values outside, NaN included, take no part and get no gradient.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if where is None:
        return x.mean() if x.size else jnp.zeros((), x.dtype)
    return jnp.where(where, x, 0).sum() / jnp.maximum(where.sum(), 1)
