"""Vectors to a finite set of codes and back: codebooks, their training and their use.

All arithmetic is in float32 (float64 for such an input), whatever the dtype. No function knows of
an axis of devices: under `jit` a batch that is sharded is one batch, and its statistics are those
of all rows. Under `pmap` each device sees its own rows; `update_averages` is linear in them, so
that the mean over devices of what it returns is the update of the whole batch.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.typing import Array, Bool, Float, Int, Key


def nearest(x: Float[Array, "*B D"], codes: Float[Array, "E D"]) -> Int[Array, "*B"]:
    """Finds the code at the least Euclidean distance from each vector, the first of several.

    Distances are taken by the product of the two matrices, from the mean of the codes, so that an
    offset that vectors and codes share costs no digits. Codes that lie nearer to each other than
    about 0.0003 of the codes' spread may be confused.
    """
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, codes.dtype), jnp.float32)
    codes = codes.astype(dtype)
    centre = codes.mean(axis=0)
    codes, x = codes - centre[None], x.astype(dtype) - _along(centre, x)
    # |x|² is the same for all codes, and left out
    products = jnp.einsum("...d,ed->...e", x, codes, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(codes).sum(axis=-1)
    return jnp.argmin(_along(squares, x) - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(x: Float[Array, "*B"], quantized: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Gives exactly `quantized`, and to `x` the gradient as if nothing had been done to it.

    References:
        Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
        https://arxiv.org/abs/1308.3432
    """
    return jax.lax.stop_gradient(quantized).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def codebook_loss(x: Float[Array, "*B D"], quantized: Float[Array, "*B D"]) -> Float[Array, ""]:
    """Draws codes to the vectors that chose them: the mean square distance, no gradient for `x`.

    References:
        van den Oord et al. 2017, "Neural discrete representation learning", eq. 3, second term;
        here the mean over all channels rather than their sum. https://arxiv.org/abs/1711.00937
    """
    return _mean_square(jax.lax.stop_gradient(x), quantized)


def commitment_loss(x: Float[Array, "*B D"], quantized: Float[Array, "*B D"]) -> Float[Array, ""]:
    """Draws vectors to the codes they chose: eq. 3, third term, without its factor β."""
    return _mean_square(x, jax.lax.stop_gradient(quantized))


def usage(ids: Int[Array, "*B"], num_codes: int) -> Float[Array, "{num_codes}"]:
    """Counts how often each code occurs; ids outside `0..E - 1` are left out."""
    flat = jnp.where(ids < 0, num_codes, ids).reshape(-1)
    return jnp.zeros((num_codes,), jnp.float32).at[flat].add(1.0, mode="drop")


def perplexity(counts: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Tells how many codes, if used equally, would have the entropy of this use: from 1 to E.

    Without any use it is 1.
    """
    total = counts.sum(axis=-1, keepdims=True)
    shares = counts.astype(jnp.float32) / jnp.where(total > 0, total, 1)
    return jnp.exp(-jax.scipy.special.xlogy(shares, shares).sum(axis=-1))


class Averages(NamedTuple):
    """What a codebook that follows its inputs is made of: moving averages over training steps.

    Attributes:
        weight: Of all steps so far: 1 - decay**steps.
        counts: Vectors a step that chose each code.
        sums: Sum of these vectors; before the first step, the codes themselves.
    """

    weight: Float[Array, ""]
    counts: Float[Array, "E"]
    sums: Float[Array, "E D"]


def start_averages(codes: Float[Array, "E D"]) -> Averages:
    """Starts at these codes, which the first step of a codebook forgets."""
    codes = codes.astype(jnp.float32)
    return Averages(jnp.zeros(()), jnp.zeros(codes.shape[:1]), codes)


def update_averages(
    averages: Averages, x: Float[Array, "*B D"], ids: Int[Array, "*B"], decay: float
) -> Averages:
    """Takes one step: the mean of the vectors that chose a code is what the code will follow.

    Args:
        averages: So far.
        x: Of the step; at least one vector.
        ids: The code that each chose.
        decay: Share of the old averages that stays.

    References:
        van den Oord et al. 2017, appendix A.1, eq. 6 to 8, with the start of the averages at 0
        corrected as in Kingma and Ba 2015, section 3.
    """
    x, ids = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1]), ids.reshape(-1)
    codes = averages.counts.shape[0]
    sums = jnp.zeros_like(averages.sums).at[ids].add(x.astype(jnp.float32))
    old = averages._replace(sums=jnp.where(averages.weight > 0, averages.sums, 0.0))
    new = Averages(jnp.ones(()), usage(ids, codes), sums)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, old, new)


def averaged_codes(averages: Averages, epsilon: float = 1e-5) -> Float[Array, "E D"]:
    """Gives the codes: the averaged sums over the averaged counts.

    Counts are smoothed as if each code had been chosen `epsilon` times more, the total being as
    before (Laplace): codes that no vector chose for long shrink towards 0.
    """
    weight = jnp.where(averages.weight > 0, averages.weight, 1.0)
    counts, sums = averages.counts / weight, averages.sums / weight
    total = counts.sum()
    smoothed = (counts + epsilon) / (total + epsilon * counts.shape[0]) * total
    smoothed = jnp.where(averages.weight > 0, smoothed, 1.0)
    return sums / smoothed[:, None]


def revive_averages(
    averages: Averages, x: Float[Array, "*B D"], key: Key[Array, ""], below: float
) -> Averages:
    """Puts each code that is hardly chosen on a random vector of the batch, as if of mean use.

    Comes before `update_averages`, so that devices of `pmap` agree on which codes these are; each
    draws vectors of its own, and a code lands on their mean.

    Args:
        averages: Before a step.
        x: Vectors of the batch.
        key: Of the choice.
        below: A code is replaced if its count is less than this share of the mean count; a code
            of mean use that is never chosen again falls so low after log(below) / log(decay) steps.

    References:
        Dhariwal et al. 2020, "Jukebox", section 3.1 (random restarts), with a bound on the count.
        https://arxiv.org/abs/2005.00341
    """
    mean = averages.counts.mean()
    dead = averages.counts < below * mean
    sums = revive(averages.sums, dead, mean * x.astype(jnp.float32), key)
    return averages._replace(counts=jnp.where(dead, mean, averages.counts), sums=sums)


def revive(
    codes: Float[Array, "E D"],
    dead: Bool[Array, "E"],
    x: Float[Array, "*B D"],
    key: Key[Array, ""],
) -> Float[Array, "E D"]:
    """Replaces dead codes by random vectors of the batch, of which one may be drawn twice."""
    x = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1])
    rows = jax.random.randint(key, dead.shape, 0, x.shape[0])
    return jnp.where(dead[:, None], x[rows].astype(codes.dtype), codes)


def fsq_bound(
    z: Float[Array, "*B D"], levels: tuple[int, ...], epsilon: float = 1e-3
) -> Float[Array, "*B D"]:
    """Bounds channel i so that rounding gives one of `levels[i]` integers about 0.

    An even number of levels has one more below 0 than above, by a shift of half a step.

    Args:
        z: Any numbers.
        levels: Of each of the D channels, at least 2.
        epsilon: Share of the range that is kept from the outermost roundings.

    Raises:
        ValueError: If D is not the number of levels, one of them is less than 2, or their product
            exceeds what int32 holds.

    References:
        Mentzer et al. 2023, "Finite scalar quantization", appendix A.1; its tangent is kept, which
        puts 0 only nearly at 0 for even levels. https://arxiv.org/abs/2309.15505
    """
    _check_levels(z.shape[-1], levels)
    number = np.array(levels)
    half = (number - 1) * (1 - epsilon) / 2
    offset = np.where(number % 2 == 1, 0.0, 0.5)
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    parts = (half, offset, np.tan(offset / half))
    half, offset, shift = (_along(jnp.asarray(part, dtype), z) for part in parts)
    return (jnp.tanh(z.astype(dtype) + shift) * half - offset).astype(z.dtype)


def fsq_quantize(z: Float[Array, "*B D"], levels: tuple[int, ...]) -> Float[Array, "*B D"]:
    """Rounds each bounded channel and brings it to -1..1; rounding lets gradients through.

    Raises:
        ValueError: As `fsq_bound`.
    """
    bounded = fsq_bound(z.astype(jnp.promote_types(z.dtype, jnp.float32)), levels)
    rounded = straight_through(bounded, jnp.round(bounded))
    return (rounded / _along(_half(levels), z)).astype(z.dtype)


def fsq_ids(codes: Float[Array, "*B D"], levels: tuple[int, ...]) -> Int[Array, "*B"]:
    """Numbers codes of `fsq_quantize` from 0 on, the first channel the fastest.

    Raises:
        ValueError: As `fsq_bound`.
    """
    _check_levels(codes.shape[-1], levels)
    half = _along(_half(levels), codes)
    digits = jnp.round(codes.astype(jnp.float32) * half + half).astype(jnp.int32)
    return (digits * _along(_places(levels), codes)).sum(axis=-1, dtype=jnp.int32)


def fsq_codes(ids: Int[Array, "*B"], levels: tuple[int, ...]) -> Float[Array, "*B D"]:
    """Gives the code of each number: the exact inverse of `fsq_ids`, in float32."""
    ids = ids[..., None].astype(jnp.int32)
    digits = ids // _along(_places(levels), ids) % _along(jnp.asarray(levels, jnp.int32), ids)
    half = _along(_half(levels), ids)
    return (digits.astype(jnp.float32) - half) / half


def gumbel_weights(
    logits: Float[Array, "*B E"],
    temperature: float | Float[Array, ""],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*B E"]:
    """Draws from a softmax in a form that gradients pass: weights that become one-hot as it cools.

    Args:
        logits: Of each code.
        temperature: 0 gives one-hot weights, and no gradient; it may be traced.
        key: Of the Gumbel noise; without one the weights are those of the logits themselves.

    Returns:
        Weights that sum to 1, in the dtype of the logits.

    References:
        Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax", eq. 2.
        https://arxiv.org/abs/1611.01144
        Ramesh et al. 2021, "Zero-shot text-to-image generation", section 2.1.
        https://arxiv.org/abs/2102.12092
    """
    y = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if key is not None:
        y = y + jax.random.gumbel(key, y.shape, y.dtype)
    temperature = jnp.asarray(temperature, y.dtype)
    soft = jax.nn.softmax(y / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    hard = jax.nn.one_hot(y.argmax(axis=-1), y.shape[-1], dtype=y.dtype)
    return jnp.where(temperature > 0, soft, hard).astype(logits.dtype)


def kl_to_uniform(logits: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Measures in nats how far each softmax is from using all E codes alike: from 0 to log E."""
    log_shares = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return (jnp.exp(log_shares) * log_shares).sum(axis=-1) + math.log(logits.shape[-1])


def _mean_square(x: Array, y: Array) -> Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.square(x.astype(dtype) - y.astype(dtype)).mean()


def _check_levels(channels: int, levels: tuple[int, ...]) -> None:
    if channels != len(levels) or min(levels, default=0) < 2 or math.prod(levels) >= 2**31:
        raise ValueError(
            f"D={channels} channels need as many levels, each at least 2, of a product below 2**31;"
            f" got levels={levels}."
        )


def _places(levels: tuple[int, ...]) -> Array:
    return jnp.asarray(np.cumprod([1, *levels[:-1]]), jnp.int32)


def _half(levels: tuple[int, ...]) -> Array:
    return jnp.asarray(np.array(levels) // 2, jnp.float32)


def _along(row: Array, x: Array) -> Array:
    """Lays a row along the last axis of `x`."""
    return row.reshape((1,) * (x.ndim - 1) + (-1,))
