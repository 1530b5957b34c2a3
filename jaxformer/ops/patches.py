"""Images to sequences and back, without loss."""

import math

import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int, Shaped


def patchify(
    images: Shaped[Array, "B *size C"], patch: tuple[int, ...]
) -> Shaped[Array, "B P channels"]:
    """Cuts images into patches, rows of patches first; within a patch rows, columns, channels.

    Args:
        images: Images, `B height width C`; clips, `B frames height width C`; or any other number
            of axes.
        patch: Size of a patch on each axis: height and width in pixels.

    Returns:
        P patches of `ph * pw * C` numbers each.

    Raises:
        ValueError: If a patch does not divide the image.
    """
    batch, *size, channels = images.shape
    grid = grid_of(tuple(size), patch)
    axes = len(grid)
    pairs = [number for pair in zip(grid, patch) for number in pair]
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    cut = images.reshape(batch, *pairs, channels).transpose(order)
    return cut.reshape(batch, math.prod(grid), math.prod(patch) * channels)


def unpatchify(
    patches: Shaped[Array, "B P channels"], patch: tuple[int, ...], size: tuple[int, ...]
) -> Shaped[Array, "B *size C"]:
    """Puts patches together again: the exact inverse of `patchify`.

    Args:
        patches: P patches, as `patchify` orders them.
        patch: Size of a patch on each axis: height and width in pixels.
        size: The same of the image.

    Raises:
        ValueError: If a patch does not divide the image, or the number or the size of the patches
            does not fit.
    """
    batch, count, numbers = patches.shape
    grid, pixels = grid_of(size, patch), math.prod(patch)
    if count != math.prod(grid) or numbers % pixels:
        raise ValueError(
            f"an image of {_by(size)} has P={math.prod(grid)} patches of a multiple of "
            f"{pixels} numbers; got P={count} of {numbers}."
        )
    axes = len(grid)
    order = (0, *(n for axis in range(1, axes + 1) for n in (axis, axis + axes)), 2 * axes + 1)
    cut = patches.reshape(batch, *grid, *patch, numbers // pixels)
    return cut.transpose(order).reshape(batch, *size, numbers // pixels)


def grid_of(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Counts the patches on each axis of an image.

    Raises:
        ValueError: If a patch does not divide the image.
    """
    fits = len(size) == len(patch) and all(p >= 1 and n % p == 0 for n, p in zip(size, patch))
    if not fits:
        raise ValueError(f"patches of {_by(patch)} do not divide an image of {_by(size)}.")
    return tuple(n // p for n, p in zip(size, patch))


def bits_to_tokens(bits: Shaped[Array, "*B k"]) -> Int[Array, "*B"]:
    """Reads the last axis as a binary number of k digits, the first the most significant.

    With `patchify` it makes tokens of binary images: 2×2 pixels are one of 16 symbols.

    Args:
        bits: Booleans, or numbers of which any but 0 counts as 1.

    Returns:
        int32 in `0..2**k - 1`.

    Raises:
        ValueError: If k exceeds 31.
    """
    weights = _weights(bits.shape[-1]).reshape((1,) * (bits.ndim - 1) + (-1,))
    return jnp.where(bits != 0, weights, 0).sum(axis=-1, dtype=jnp.int32)


def tokens_to_bits(tokens: Int[Array, "*B"], k: int) -> Bool[Array, "*B {k}"]:
    """Writes each token as k binary digits: the exact inverse of `bits_to_tokens`.

    Of a token outside `0..2**k - 1` the lowest k bits are written.

    Raises:
        ValueError: If k exceeds 31.
    """
    weights = _weights(k).reshape((1,) * tokens.ndim + (-1,))
    return (tokens[..., None].astype(jnp.int32) & weights) != 0


def _weights(k: int) -> Int[Array, "k"]:
    if not 0 <= k <= 31:
        raise ValueError(f"tokens are int32 and hold at most 31 bits, got k={k}.")
    return jnp.array([1 << place for place in reversed(range(k))], jnp.int32)


def _by(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
