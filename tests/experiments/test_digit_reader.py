"""The reader learns to read, repeats itself, and is shown digits that are still digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import digit_reader
from jaxformer.training import mnist

DIGITS = mnist.load("embedded")
IMAGES = jnp.asarray(DIGITS.test_images[:7], jnp.float32) / 255


def short_training(**arguments):
    return digit_reader.train_reader(
        DIGITS.train_images, DIGITS.train_labels, **{"steps": 40, "batch": 50} | arguments
    )


@pytest.fixture(scope="module")
def params():
    return short_training()


def test_forty_steps_read_most_digits(params):
    guesses = digit_reader.read(params, mnist.threshold(DIGITS.test_images)).argmax(-1)
    assert np.mean(np.asarray(guesses) == DIGITS.test_labels) > 0.7


def test_the_same_seed_gives_the_same_reader_bit_for_bit(params):
    jax.tree.map(np.testing.assert_array_equal, params, short_training())


def test_what_is_read_is_a_distribution_whatever_the_dtype(params):
    binary = mnist.threshold(DIGITS.test_images[:50])
    scores = digit_reader.read(params, binary)
    np.testing.assert_allclose(np.exp(scores).sum(-1), 1, atol=1e-5)
    for dtype in (bool, np.float32):
        np.testing.assert_array_equal(digit_reader.read(params, binary.astype(dtype)), scores)


def test_grey_bytes_are_refused_since_ink_is_at_most_1(params):
    with pytest.raises(ValueError, match="ink in \\[0, 1\\], got 255"):
        digit_reader.read(params, DIGITS.test_images[:2])


def test_no_distortion_changes_nothing():
    still = digit_reader.distort(jax.random.key(0), IMAGES, strength=0.0)
    np.testing.assert_allclose(still, IMAGES, atol=1e-6)


def test_distorted_digits_keep_their_ink_and_differ_from_draw_to_draw():
    first, second = (digit_reader.distort(jax.random.key(seed), IMAGES) for seed in (0, 1))
    assert float(jnp.abs(first - second).max(axis=(1, 2)).min()) > 0.1
    ink = first.sum((1, 2)) / IMAGES.sum((1, 2))
    assert float(jnp.abs(jnp.log(ink)).max()) < 0.3  # twice a stretch of 12 %, and the margin
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
