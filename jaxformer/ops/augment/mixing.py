"""Images mixed with each other, and erased in part."""

import jax
import jax.numpy as jnp

from jaxformer.ops.augment.chance import check_light, sometimes
from jaxformer.ops.augment.geometry import random_boxes
from jaxformer.typing import Array, Bool, Float, Key


def mixup(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    labels: Float[Array, "B V"],
    alpha: float,
) -> tuple[Float[Array, "B height width C"], Float[Array, "B V"]]:
    """Blends each image and its label with another of the batch, by a share of its own.

    Args:
        key: Of the partners, a permutation of the batch, and of the shares.
        images: Images.
        labels: A distribution over V classes for each, such as a one-hot vector.
        alpha: Shares are drawn from Beta(alpha, alpha); 0 changes nothing.

    Raises:
        ValueError: If `alpha` is negative, or images or labels are no floats.

    References:
        Zhang et al. 2018, "mixup: beyond empirical risk minimization", eq. 1 (with a share for each
        image, not for the batch). https://arxiv.org/abs/1710.09412
    """
    check_light(images, labels)
    if _unmixed(alpha):
        return images, labels
    share, partner = _partners(key, len(images), alpha)

    def mix(x: Array) -> Array:
        kept = share.reshape(-1, *(1,) * (x.ndim - 1))
        return (kept * x + (1 - kept) * x[partner]).astype(x.dtype)

    return mix(images), mix(labels)


def cutmix(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    labels: Float[Array, "B V"],
    alpha: float,
) -> tuple[Float[Array, "B height width C"], Float[Array, "B V"]]:
    """Pastes a box of another image of the batch into each, and mixes labels by area.

    A box has the shape of the image and a centre anywhere in it; what lies outside is cut off, and
    the labels are mixed by the pixels that were in fact replaced.

    Args:
        key: Of the partners, a permutation of the batch, the areas and places.
        images: Images.
        labels: A distribution over V classes for each, such as a one-hot vector.
        alpha: The share of the image that is kept is drawn from Beta(alpha, alpha); 0 changes
            nothing.

    Raises:
        ValueError: If `alpha` is negative, or images or labels are no floats.

    References:
        Yun et al. 2019, "CutMix: regularization strategy to train strong classifiers with
        localizable features", eq. 1 and 2 (with a box for each image, not for the batch).
        https://arxiv.org/abs/1905.04899
    """
    check_light(images, labels)
    if _unmixed(alpha):
        return images, labels
    for_partners, for_places = jax.random.split(key)
    count, height, width, _ = images.shape
    share, partner = _partners(for_partners, count, alpha)
    size = jnp.array([height, width], jnp.float32)[None, :]
    shape = size * jnp.sqrt(1 - share)[:, None]
    centre = size * jax.random.uniform(for_places, shape.shape)
    inside = _inside(jnp.concatenate([centre - shape / 2, shape], axis=-1), (height, width))
    kept = 1 - inside.mean((1, 2, 3))[:, None]
    mixed = (kept * labels + (1 - kept) * labels[partner]).astype(labels.dtype)
    return jnp.where(inside, images[partner], images), mixed


def random_erase(
    key: Key[Array, ""],
    images: Float[Array, "B height width C"],
    *,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: tuple[float, float] = (0.3, 3.3),
    fill: float = 0.0,
    probability: float = 0.5,
) -> Float[Array, "B height width C"]:
    """Paints over a random box of each image with a probability.

    Args:
        key: Of the boxes and the choice of images.
        images: Images.
        area: Least and greatest share of the image that a box covers.
        aspect: Least and greatest ratio of a box's width to its height.
        fill: What is painted.
        probability: With which an image gets a box at all.

    Raises:
        ValueError: If a range is empty or reaches out of what is possible.

    References:
        Zhong et al. 2020, "Random erasing data augmentation", algorithm 1 (with one value to paint
        instead of noise, and aspects log-uniform). https://arxiv.org/abs/1708.04896
    """
    for_boxes, for_choice = jax.random.split(key)
    count, height, width, _ = images.shape
    boxes = random_boxes(for_boxes, count, (height, width), area, aspect)
    inside = _inside(boxes, (height, width))
    return sometimes(for_choice, probability, images, jnp.where(inside, fill, images))


def _unmixed(alpha: float) -> bool:
    if alpha < 0:
        raise ValueError(f"mixing needs alpha >= 0, got alpha={alpha}.")
    return alpha == 0


def _partners(
    key: Key[Array, ""], count: int, alpha: float
) -> tuple[Float[Array, "{count}"], Array]:
    """Draws the share each image keeps, and the rows that give the rest."""
    for_share, for_partner = jax.random.split(key)
    share = jax.random.beta(for_share, alpha, alpha, (count,))
    return share, jax.random.permutation(for_partner, count)


def _inside(
    boxes: Float[Array, "B 4"], size: tuple[int, int]
) -> Bool[Array, "B {size[0]} {size[1]} 1"]:
    """Says which pixels have their centre in a box."""
    top, left, height, width = boxes.T[..., None]
    row, column = (jnp.arange(side)[None, :] + 0.5 for side in size)
    rows = (row >= top) & (row < top + height)
    columns = (column >= left) & (column < left + width)
    return rows[:, :, None, None] & columns[:, None, :, None]
