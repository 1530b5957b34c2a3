"""Positions that are added: tables for the stream, biases for the logits of attention.

Rotary positions, which multiply, are in `rotary`.
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxformer.typing import Array, DTypeLike, Float, Int


def sinusoidal(
    positions: Int[Array, "*B T"],
    width: int,
    *,
    max_period: float = 10_000.0,
    halves: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*B T {width}"]:
    """Makes sine and cosine waves of each position: sines in even channels, cosines in odd ones.

    Pair `i` has the frequency `max_period**(-2i/D)` radians a token. The arithmetic is in float32,
    and exact to its last digits up to position 4,096.

    Args:
        positions: In tokens.
        width: D.
        max_period: Ratio of the slowest wave to the first, whose frequency is 1.
        halves: Puts all sines before all cosines.
        dtype: Of the result.

    Raises:
        ValueError: If D (`width`) is odd or `max_period` is not positive.

    References:
        Vaswani et al. 2017, "Attention is all you need", section 3.5, as printed; the authors' code
        has `halves`. https://arxiv.org/abs/1706.03762
    """
    if width % 2 or max_period <= 0:
        raise ValueError(f"sinusoidal needs D even, max_period > 0; got D={width}, {max_period=}.")
    frequency = max_period ** (-np.arange(0, width, 2) / width)
    # A position times the first 12 bits of a frequency is exact; the rest makes a small angle.
    step = 2.0 ** (np.frexp(frequency)[1] - 12)
    near = np.round(frequency / step) * step
    at = jnp.expand_dims(positions, -1).astype(jnp.float32)
    angle, rest = (
        at * jnp.asarray(part, jnp.float32).reshape((1,) * positions.ndim + (-1,))
        for part in (near, frequency - near)
    )
    sines = jnp.sin(angle) * jnp.cos(rest) + jnp.cos(angle) * jnp.sin(rest)
    cosines = jnp.cos(angle) * jnp.cos(rest) - jnp.sin(angle) * jnp.sin(rest)
    if halves:
        return jnp.concatenate([sines, cosines], axis=-1).astype(dtype)
    return jnp.stack([sines, cosines], axis=-1).reshape(*positions.shape, width).astype(dtype)


def sinusoidal_grid(
    coordinates: Float[Array, "*B A"], width: int, *, max_period: float = 10_000.0
) -> Float[Array, "*B {width}"]:
    """Makes waves of each coordinate: one share of the channels an axis, the last axis first.

    Of each share the first half are the sines, the second the cosines, in float32. With rows and
    columns of patches these are the positions of MAE and of I-JEPA, whose first half of channels
    tells the columns.

    Args:
        coordinates: On A axes, such as row and column, in patches.
        width: D.
        max_period: Ratio of the slowest wave to the first, whose frequency is 1.

    Raises:
        ValueError: If D (`width`) is no multiple of 2·A.

    References:
        He et al. 2022, "Masked autoencoders are scalable vision learners", the authors' code.
        https://arxiv.org/abs/2111.06377
    """
    axes = coordinates.shape[-1]
    if axes < 1 or width % (2 * axes):
        raise ValueError(f"sinusoidal_grid needs D to be a multiple of 2·A; D={width}, A={axes}.")
    steps = np.arange(width // (2 * axes)) / (width // (2 * axes))
    frequencies = jnp.asarray(max_period**-steps, jnp.float32)
    angles = coordinates[..., ::-1, None] * _aligned(frequencies, coordinates.ndim + 1)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*coordinates.shape[:-1], width)


def resize_grid(
    table: Float[Array, "P D"],
    grid: tuple[int, ...],
    new: tuple[int, ...],
    *,
    antialias: bool = False,
) -> Float[Array, "P2 D"]:
    """Interpolates a table of positions on a grid of patches to another grid, by cubic splines.

    It is PyTorch's bicubic interpolation between pixel centres, with the outermost rows repeated
    beyond the edges; or with `antialias` the smoother one that averages where it shrinks. The
    arithmetic is in float32. The same grid gives the same table.

    Args:
        table: Rows of the grid in order, the last axis fastest.
        grid: Patches on each axis.
        new: The same of the result.
        antialias: Widens the spline by the factor of shrinking, as DINOv2 with registers does.

    Raises:
        ValueError: If P is not what `grid` says, or the numbers of axes differ.

    References:
        Keys 1981, "Cubic convolution interpolation for digital image processing", eq. 4 (slope
        -0.75 without `antialias`, -0.5 with it). https://doi.org/10.1109/TASSP.1981.1163711
    """
    if table.shape[0] != math.prod(grid) or len(grid) != len(new):
        raise ValueError(f"a table of {table.shape[0]} rows of grid {grid} cannot become {new}.")
    if grid == new:
        return table
    resized = table.astype(jnp.float32).reshape(*grid, -1)
    for axis, (before, after) in enumerate(zip(grid, new)):
        weights = jnp.asarray(_cubic(before, after, antialias), jnp.float32)
        resized = jnp.moveaxis(jnp.tensordot(weights, resized, (1, axis)), 0, axis)
    return resized.reshape(math.prod(new), -1).astype(table.dtype)


def _cubic(before: int, after: int, antialias: bool) -> np.ndarray:
    """The weights of `before` samples in each of `after` new ones."""
    scale = before / after
    wide = max(scale, 1.0) if antialias else 1.0
    slope = -0.5 if antialias else -0.75
    centres = (np.arange(after) + 0.5) * scale - 0.5
    reach = 2 * math.ceil(wide) + 1
    places = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(places - centres[:, None]) / wide
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = slope * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:  # nothing is beyond the edges: what is there counts the more
        weights = np.where((places >= 0) & (places < before), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((after, before))
    np.add.at(matrix, (np.arange(after)[:, None], places.clip(0, before - 1)), weights)
    return matrix


def lookup(
    table: Float[Array, "rows D"], length: int, offset: int | Int[Array, ""] = 0
) -> Float[Array, "{length} D"]:
    """Takes `length` rows of a learned table of positions, from `offset` on.

    Rows past the end raise where `offset` is an int. A traced offset cannot raise: a start
    past the end gives rows of NaN instead of a silent last row.

    Raises:
        ValueError: If the rows asked for are not in the table.
    """
    rows = table.shape[0]
    if isinstance(offset, int):
        if offset < 0 or offset + length > rows:
            raise ValueError(
                f"positions {offset}..{offset + length - 1} are not in a table of {rows} rows."
            )
        return table[offset : offset + length]
    wanted = offset + jnp.arange(length)
    wanted = jnp.where(wanted < 0, rows, wanted)  # else -1 would mean the last row
    return table.at[wanted].get(mode="fill", fill_value=jnp.nan)


def alibi_slopes(num_heads: int) -> Float[Array, "{num_heads}"]:
    """Gives each head its slope: a geometric sequence from `2**(-8/N)` down to `2**-8`.

    Where N is no power of two, the heads beyond the largest power of two P below it take every
    other slope of the sequence for 2·P heads.

    Raises:
        ValueError: If N (`num_heads`) is less than 1.

    References:
        Press et al. 2022, "Train short, test long", section 3; the rule for other N is that of
        the authors' code. https://arxiv.org/abs/2108.12409
    """
    return jnp.array(alibi_slope_list(num_heads), jnp.float32)


def alibi_slope_list(num_heads: int) -> tuple[float, ...]:
    """The numbers of `alibi_slopes`, as Python has them."""
    if num_heads < 1:
        raise ValueError(f"alibi_slopes needs at least one head, got N={num_heads}.")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return tuple((slopes + between)[:num_heads])


def alibi_bias(
    slopes: Float[Array, "N"],
    query_length: int,
    key_length: int,
    offset: int | Int[Array, ""] = 0,
) -> Float[Array, "1 N {query_length} {key_length}"]:
    """Makes a bias that falls linearly with distance: `-slope * |offset + t - s|`.

    Under a causal mask this is the paper's; the absolute value serves attention in both directions.

    Args:
        slopes: One a head, as from `alibi_slopes`.
        query_length: T.
        key_length: S.
        offset: Position of query 0 among the keys.
    """
    distance = jnp.abs(_relative(query_length, key_length, offset)).astype(jnp.float32)
    return -slopes[None, :, None, None] * distance[None, None]


def t5_buckets(
    query_length: int,
    key_length: int,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    offset: int | Int[Array, ""] = 0,
) -> Int[Array, "{query_length} {key_length}"]:
    """Sorts distances into buckets: one each for the near, logarithmically wider ones for the far.

    Half of the buckets hold exact distances, the other half grow up to `max_distance`, beyond which
    all share the last. If `bidirectional`, keys behind and keys ahead have half of the buckets
    each; if not, all keys ahead share the bucket of distance 0.

    Raises:
        ValueError: If there are too few buckets, or `max_distance` does not exceed the exact ones.

    References:
        Raffel et al. 2020, "T5", section 2.1. https://arxiv.org/abs/1910.10683
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact or (bidirectional and num_buckets % 2):
        raise ValueError(
            f"t5_buckets cannot divide: {num_buckets=}, {max_distance=}, {bidirectional=}."
        )
    ahead = _relative(query_length, key_length, offset)
    first = jnp.where(ahead > 0, side, 0) if bidirectional else 0
    distance = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)

    ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
    growth = jnp.log(ratio) / math.log(max_distance / exact) * (side - exact)
    far = jnp.minimum(exact + growth.astype(jnp.int32), side - 1)
    return first + jnp.where(distance < exact, distance, far)


def bucket_bias(table: Float[Array, "E N"], buckets: Int[Array, "T S"]) -> Float[Array, "1 N T S"]:
    """Looks up each pair's bucket in a learned table: the bias of T5, and of Swin's windows.

    A bucket that the table lacks gives NaN, since an index cannot raise while traced.
    """
    buckets = jnp.where(buckets < 0, table.shape[0], buckets)
    bias = table.at[buckets].get(mode="fill", fill_value=jnp.nan)
    return bias.transpose(2, 0, 1)[None]


def _aligned(x: Array, ndim: int) -> Array:
    return x.reshape((1,) * (ndim - 1) + x.shape)


def _relative(query_length: int, key_length: int, offset: int | Array) -> Array:
    """How far each key is ahead of each query: `s - (offset + t)`."""
    return jnp.arange(key_length)[None, :] - (offset + jnp.arange(query_length))[:, None]
