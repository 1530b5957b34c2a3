"""Rotary positions: queries and keys are turned so that their products know only distances."""

import jax.numpy as jnp

from jaxformer.typing import Array, Float, Int, Shaped


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"] | Int[Array, "T"],
    theta: float = 10_000.0,
    interleaved: bool = False,
    *,
    frequencies: Float[Array, "P"] | None = None,
    gain: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Turns each pair of channels by an angle linear in position.

    Pair `i` turns by `p * theta**(-2i/H)` radians at position `p`, so the dot product of two
    rotated vectors depends on their positions only through the difference. Pair `i` is channels
    `(i, i + H/2)`, or `(2i, 2i + 1)` if `interleaved`; weights made for one form serve the other
    after `to_half_split` or `to_interleaved`. Angles are in float32 whatever the dtype of `x`.

    Args:
        x: Queries or keys; N heads of H channels.
        positions: Token index of each row; need not start at 0. With rank 1, the same in every row.
        theta: Ratio base of the wavelengths, which run from 2π to 2π·theta.
        interleaved: Pairs neighbours, as the paper does, rather than halves.
        frequencies: Radians a token of each pair, in place of those of `theta`. If there are fewer
            than H / 2, only the first channels turn, two for each.
        gain: Factor of the channels that turn.

    Returns:
        An array with the shape and dtype of `x`.

    Raises:
        ValueError: If H is odd, `theta` is not positive, `positions` do not fit B and T, or there
            are more frequencies than pairs.

    References:
        Su et al. 2021, "RoFormer", eq. 34. https://arxiv.org/abs/2104.09864
        (the paper pairs neighbours; half-split is the form of GPT-NeoX and LLaMA checkpoints).
    """
    head_dim = x.shape[-1]
    if frequencies is None:
        if head_dim % 2:
            raise ValueError(f"rotate needs an even head size H, got H={head_dim}.")
        frequencies = _frequencies(head_dim, theta)
    channels = 2 * frequencies.shape[0]
    if channels > head_dim:
        raise ValueError(f"{channels // 2} frequencies are too many for H={head_dim}.")
    angle = _angle(_rows("positions", positions, x, 1), frequencies)[:, :, None]
    x32, rest = x[..., :channels].astype(jnp.float32), x[..., channels:]
    if interleaved:
        y = jnp.stack(_turn(x32[..., ::2], x32[..., 1::2], angle, gain), axis=-1)
        y = y.reshape(x32.shape)
    else:
        left, right = jnp.split(x32, 2, axis=-1)
        y = jnp.concatenate(_turn(left, right, angle, gain), axis=-1)
    y = y.astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y


def rotate_axial(
    x: Float[Array, "B T N H"],
    coordinates: Int[Array, "B T A"] | Int[Array, "T A"],
    theta: float = 10_000.0,
) -> Float[Array, "B T N H"]:
    """Turns one share of the channels by each coordinate, so that products know offsets per axis.

    The H channels are cut into A shares in order; share `a` is rotated half-split by coordinate `a`
    with the wavelengths of a head of size H/A. With one axis this is `rotate`.

    Args:
        x: Queries or keys; N heads of H channels.
        coordinates: Place of each token on A axes, such as row and column of a patch.
        theta: Ratio base of the wavelengths.

    Returns:
        An array with the shape and dtype of `x`.

    Raises:
        ValueError: If H is no multiple of 2·A, `theta` is not positive, or `coordinates` do not fit
            B and T.

    References:
        Heo et al. 2024, "Rotary position embedding for vision transformer", section 3.2 (axial
        frequency). https://arxiv.org/abs/2403.13298
    """
    axes, head_dim = coordinates.shape[-1], x.shape[-1]
    if axes == 0 or head_dim % (2 * axes):
        raise ValueError(
            f"rotate_axial needs H to be a multiple of 2·A, got H={head_dim}, A={axes}."
        )
    frequencies = _frequencies(head_dim // axes, theta)
    angle = _angle(_rows("coordinates", coordinates, x, 2), frequencies)[:, :, None]
    shares = x.astype(jnp.float32).reshape(*x.shape[:-1], axes, 2, -1)
    turned = _turn(shares[..., 0, :], shares[..., 1, :], angle)
    return jnp.stack(turned, axis=-2).reshape(x.shape).astype(x.dtype)


def to_interleaved(x: Shaped[Array, "... H"]) -> Shaped[Array, "... H"]:
    """Reorders the last axis from half-split to interleaved: `(i, i + H/2)` goes to `(2i, 2i + 1)`.

    Applied to queries, keys, or the projections that make them (their last axis is H: `D N H`), it
    carries half-split weights to interleaved rotation. Attention gives the same numbers, since the
    products of queries and keys do not depend on the order of channels.

    Raises:
        ValueError: If H is odd.
    """
    return _reorder(x, (2, -1))


def to_half_split(x: Shaped[Array, "... H"]) -> Shaped[Array, "... H"]:
    """Reorders the last axis from interleaved to half-split; the inverse of `to_interleaved`.

    Raises:
        ValueError: If H is odd.
    """
    return _reorder(x, (-1, 2))


def _reorder(x: Array, pairs: tuple[int, int]) -> Array:
    if x.shape[-1] % 2:
        raise ValueError(f"pairs of channels need an even H, got H={x.shape[-1]}.")
    return x.reshape(*x.shape[:-1], *pairs).swapaxes(-1, -2).reshape(x.shape)


def _rows(name: str, positions: Array, x: Array, rank: int) -> Array:
    """Adds the axis B that `positions` may lack, and checks what they share with `x`."""
    rows = positions[None] if positions.ndim == rank else positions
    for axis, found, size in zip("BT", rows.shape, x.shape):
        if found != size and not (axis == "B" and found == 1):
            raise ValueError(f"{name} have {axis}={found}, x has {axis}={size}.")
    return rows


def _frequencies(head_dim: int, theta: float) -> Array:
    if theta <= 0:
        raise ValueError(f"rotary positions need theta > 0, got {theta=}.")
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _angle(positions: Array, frequencies: Array) -> Array:
    return jnp.expand_dims(positions, -1).astype(jnp.float32) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )


def _turn(first: Array, second: Array, angle: Array, gain: float = 1.0) -> tuple[Array, Array]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if gain != 1.0:
        cos, sin = cos * gain, sin * gain
    return first * cos - second * sin, second * cos + first * sin
