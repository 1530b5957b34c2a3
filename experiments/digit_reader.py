"""A reader of handwritten digits that never saw a generated one: the judge of generated digits.

    python -m experiments.digit_reader

Three strided convolutions, 110,000 parameters, trained on the 10,000 embedded digits under random
affine distortion, binarised; what it reads is the mean over a few shifts.
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.typing import Array, Float, Int, Key, PyTree, Shaped

_SIDE = 28
Ink = Literal["threshold", "dynamic", "grey"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How the reader is trained.

    Attributes:
        steps: Training steps.
        batch: Digits a step.
        ink: What the images it is to read look like.
        seed: Of the parameters and of everything random.
        data: Origin of the digits, as `jaxformer.training.mnist.load` takes it.
    """

    steps: int = 1500
    batch: int = 100
    ink: Ink = "threshold"
    seed: int = 0
    data: str = "embedded"


class Reader(nn.Module):
    """Turns images with ink in [0, 1] into logits of the ten digits.

    Strided convolutions, since pooling costs more than it gives on CPU.
    """

    widths: tuple[int, int, int] = (24, 48, 96)

    @nn.compact
    def __call__(self, images: Float[Array, "B 28 28"]) -> Float[Array, "B 10"]:
        """Reads a batch."""
        x = images[..., None] - 0.1
        for width, size in zip(self.widths, (6, 4, 3)):
            x = nn.relu(nn.Conv(width, (size, size), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def distort(
    key: Key[Array, ""], images: Float[Array, "B 28 28"], strength: float = 1.0
) -> Float[Array, "B 28 28"]:
    """Turns, slants, stretches and shifts each image at random, with linear interpolation.

    Done as two passes of one axis each, every row of pixels moving as a whole: a rotation is a
    slant of the columns and one of the rows. So it is a product of small matrices, without the
    gathers that are slow on CPU and TPU.
    """
    low, high = jnp.asarray([[-0.15, -0.15, -0.12, -0.12, -1.5, -1.5]]) * strength, 0
    draws = jax.random.uniform(key, (len(images), 6), minval=low, maxval=-low)
    turn, slant, wide, tall, right, down = draws.T[..., None, None]
    del high
    x = _resample(images, turn + slant, wide, right)
    return _resample(x.swapaxes(1, 2), -turn, tall, down).swapaxes(1, 2)


def _resample(
    images: Float[Array, "B 28 28"],
    slant: Float[Array, "B 1 1"],
    stretch: Float[Array, "B 1 1"],
    shift: Float[Array, "B 1 1"],
) -> Float[Array, "B 28 28"]:
    pixel = jnp.arange(_SIDE) - (_SIDE - 1) / 2
    source = (1 + stretch) * pixel + slant * pixel[:, None] + shift  # of each row and column
    weights = nn.relu(1 - jnp.abs(source[..., None] - pixel))
    return jnp.einsum("bik,bijk->bij", images, weights)


def train_reader(
    images: Shaped[np.ndarray, "n 28 28"],
    labels: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    steps: int = Config.steps,
    batch: int = Config.batch,
    ink: Ink = Config.ink,
) -> PyTree:
    """Trains a reader on uint8 images; the same arguments give the same parameters."""
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    key = jax.random.key(seed)
    model = Reader()
    params = model.init(key, jnp.zeros((1, _SIDE, _SIDE)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.adamw(schedule, b2=0.98, weight_decay=0.02)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state: tuple, number: Int[Array, ""], rows: Int[Array, "B"]) -> tuple:
        params, opt_state = state
        warp, speckle = jax.random.split(jax.random.fold_in(key, number))
        x = distort(warp, images[rows].astype(jnp.float32) / 255)
        if ink != "grey":
            level = 0.5 if ink == "threshold" else jax.random.uniform(speckle, x.shape)
            x = (x > level).astype(jnp.float32)

        def loss(params: PyTree) -> Float[Array, ""]:
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    state = params, optimizer.init(params)
    for number in range(steps):
        state = step(state, jnp.int32(number), order[number * batch : (number + 1) * batch])
    return state[0]


@jax.jit
def read(params: PyTree, images: Shaped[Array, "B 28 28"]) -> Float[Array, "B 10"]:
    """Gives the log-probability of each digit."""
    x = images.astype(jnp.float32)
    return jax.nn.log_softmax(Reader().apply(params, x))
