"""A ball in a box, seen as small grey frames: motion that a world model can be measured against.

Lengths are in pixels: pixel `(i, j)` has its centre at height `i + 0.5` and width `j + 0.5`. A
state is `(x, y, vx, vy)`, x along the width. Everything is a pure function of its arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float, Int, Key

_SPREAD = 2  # a whole number: only then do the pixels add up to the exact centre
RADIUS = 1.5 * _SPREAD
PUSHES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # none, left, right, up, down

Actions = Callable[[Key[Array, ""], tuple[int, int]], Int[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Box:
    """A square box and the ball in it.

    Attributes:
        side: Height and width of a frame; the ball's centre stays `RADIUS` away from its edges.
        slowest: Least speed that a ball starts with, in pixels a step.
        fastest: Highest such speed, and the bound of each velocity when pushed.
        push: What an action adds to a velocity, in pixels a step.
    """

    side: int = 16
    slowest: float = 0.4
    fastest: float = 1.2
    push: float = 0.3

    def __post_init__(self) -> None:
        if self.side <= 2 * RADIUS:
            raise ValueError(f"side={self.side} leaves a ball of radius {RADIUS:g} no room.")
        if not 0 <= self.slowest <= self.fastest:
            raise ValueError(f"0 <= {self.slowest=} <= {self.fastest=} does not hold.")


class Motion(NamedTuple):
    """What was seen, what was the case, and what was done.

    Attributes:
        frames: Grey, from 0 to 1.
        states: Of the same moments.
        actions: Index into `PUSHES`; action t leads from frame t to frame t + 1.
    """

    frames: Float[Array, "B T h w 1"]
    states: Float[Array, "B T 4"]
    actions: Int[Array, "B T"]


def idle(key: Key[Array, ""], shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Actions of someone who never pushes."""
    del key
    return jnp.zeros(shape, jnp.int32)


def pushing(key: Key[Array, ""], shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Actions drawn evenly from all."""
    return jax.random.randint(key, shape, 0, len(PUSHES))


def reflect(
    positions: Float[Array, "*B"], velocities: Float[Array, "*B"], side: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Folds free flight back between the walls: exact for any number of elastic bounces.

    The walls stand at `RADIUS` and `side - RADIUS`. Unfolded at each wall that is met, the box is a
    row of boxes in which the ball flies straight on; every second one is a mirror image.
    """
    room = side - 2 * RADIUS
    place = jnp.mod((positions - RADIUS) / room, 2.0)
    mirrored = place > 1.0
    place = jnp.where(mirrored, 2.0 - place, place)
    return RADIUS + room * place, jnp.where(mirrored, -velocities, velocities)


def step(box: Box, states: Float[Array, "*B 4"], actions: Int[Array, "*B"]) -> Float[Array, "*B 4"]:
    """Pushes, lets the ball fly for one step of time, and bounces it off the walls.

    A push takes no velocity beyond `fastest`, and leaves one alone that is there already.
    """
    push = box.push * jnp.asarray(PUSHES, states.dtype)[actions]
    velocities = states[..., 2:]
    bound = jnp.maximum(jnp.abs(velocities), box.fastest)
    velocities = jnp.clip(velocities + push, -bound, bound)
    moved = reflect(states[..., :2] + velocities, velocities, box.side)
    return jnp.concatenate(moved, axis=-1)


def render(box: Box, positions: Float[Array, "*B 2"]) -> Float[Array, "*B h w 1"]:
    """Draws the ball as a smooth bump that is 1 in its middle and 0 from `RADIUS` on, each way.

    It is a product of quadratic B-splines, whose samples at whole distances have the sum and the
    centre of mass of the curve itself: the frame's centre of mass is the position, between pixels
    as on them. The gradient with respect to the position is continuous.

    References:
        Unser 1999, "Splines: a perfect fit for signal and image processing".
        https://doi.org/10.1109/79.799930
    """
    pixels = jnp.arange(box.side) + 0.5
    distance = jnp.abs(positions[..., None] - pixels.reshape((1,) * positions.ndim + (-1,)))
    t = distance / _SPREAD
    bump = jnp.where(t < 0.5, 0.75 - t**2, 0.5 * jnp.maximum(1.5 - t, 0.0) ** 2) / 0.75
    across, down = bump[..., 0, :], bump[..., 1, :]
    return (down[..., :, None] * across[..., None, :])[..., None]


def starts(key: Key[Array, ""], box: Box, batch: int) -> Float[Array, "B 4"]:
    """Draws places evenly from the box, and velocities of any direction and allowed speed."""
    place, speed, angle = jax.random.split(key, 3)
    far = box.side - RADIUS
    positions = jax.random.uniform(place, (batch, 2), minval=RADIUS, maxval=far)
    speeds = jax.random.uniform(speed, (batch, 1), minval=box.slowest, maxval=box.fastest)
    angles = jax.random.uniform(angle, (batch,), maxval=2 * jnp.pi)
    directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.concatenate([positions, speeds * directions], axis=-1)


def sequences(
    key: Key[Array, ""], batch: int, length: int, *, actions: Actions = idle, box: Box = Box()
) -> Motion:
    """Draws balls and follows each for `length` frames; the same key gives the same motion.

    Args:
        key: Of starts and actions.
        batch: B.
        length: T, 1 or more.
        actions: Draws what is done at each step.
        box: Where the ball is.

    Raises:
        ValueError: If `batch` or `length` is below 1.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"sequences need B >= 1 and T >= 1, got B={batch}, T={length}.")
    start, act = jax.random.split(key)
    done = actions(act, (batch, length))

    def advance(states: Array, now: Array) -> tuple[Array, Array]:
        return step(box, states, now), states

    _, states = jax.lax.scan(advance, starts(start, box, batch), done.T)
    states = states.swapaxes(0, 1)
    return Motion(render(box, states[..., :2]), states, done)
