"""Images to sequences and back, without loss."""

import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Int, Shaped


def patchify(
    images: Shaped[Array, "B height width C"], patch: tuple[int, int]
) -> Shaped[Array, "B P channels"]:
    """Cuts images into patches, rows of patches first; within a patch rows, columns, channels.

    Args:
        images: Images, channels last.
        patch: Height and width of a patch in pixels.

    Returns:
        P patches of `ph * pw * C` numbers each.

    Raises:
        ValueError: If a patch does not divide the image.
    """
    batch, height, width, channels = images.shape
    ph, pw = _checked(patch, height, width)
    grid = images.reshape(batch, height // ph, ph, width // pw, pw, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, ph * pw * channels)


def unpatchify(
    patches: Shaped[Array, "B P channels"], patch: tuple[int, int], size: tuple[int, int]
) -> Shaped[Array, "B height width C"]:
    """Puts patches together again: the exact inverse of `patchify`.

    Args:
        patches: P patches, as `patchify` orders them.
        patch: Height and width of a patch in pixels.
        size: Height and width of the image in pixels.

    Raises:
        ValueError: If a patch does not divide the image, or the number or the size of the patches
            does not fit.
    """
    batch, count, numbers = patches.shape
    ph, pw = _checked(patch, *size)
    rows, columns = size[0] // ph, size[1] // pw
    if count != rows * columns or numbers % (ph * pw):
        raise ValueError(
            f"an image of {size[0]}×{size[1]} has P={rows * columns} patches of a multiple of "
            f"{ph * pw} numbers; got P={count} of {numbers}."
        )
    grid = patches.reshape(batch, rows, columns, ph, pw, numbers // (ph * pw))
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, -1)


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


def _checked(patch: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    ph, pw = patch
    if ph < 1 or pw < 1 or height % ph or width % pw:
        raise ValueError(f"patches of {ph}×{pw} do not divide an image of {height}×{width}.")
    return ph, pw
