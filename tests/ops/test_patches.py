"""Patches: exact inverses, and an order one can see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import patches

RANDOM = np.random.default_rng(0)


def test_patches_come_row_by_row():
    image = jnp.arange(24).reshape(1, 4, 6, 1)
    assert patches.patchify(image, (2, 3))[0].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


@pytest.mark.parametrize(
    ("patch", "dtype"), [((2, 5), np.uint8), ((1, 1), bool), ((6, 35), np.float32)]
)
def test_unpatchify_is_the_exact_inverse(patch, dtype):
    images = jnp.asarray(RANDOM.integers(0, 256, (2, 6, 35, 3)).astype(dtype))
    cut = patches.patchify(images, patch)
    assert cut.shape == (2, 6 * 35 // (patch[0] * patch[1]), patch[0] * patch[1] * 3)
    back = patches.unpatchify(cut, patch, (6, 35))
    assert back.dtype == images.dtype
    assert (back == images).all()


def test_channels_stay_beside_each_other():
    images = jnp.asarray(RANDOM.random((2, 4, 6, 3)), jnp.float32)
    expected = np.asarray(images)[:, 2:4, 3:6].reshape(2, -1)
    assert (patches.patchify(images, (2, 3))[:, 3] == expected).all()


def test_clips_are_cut_in_time_too_and_put_together_again():
    clip = jnp.asarray(RANDOM.random((2, 4, 6, 10, 3)), jnp.float32)
    cut = patches.patchify(clip, (2, 3, 5))
    assert cut.shape == (2, 2 * 2 * 2, 2 * 3 * 5 * 3)
    second = np.asarray(clip)[:, :2, :3, 5:]  # the last axis runs fastest
    assert (cut[:, 1] == second.reshape(2, -1)).all()
    assert (patches.unpatchify(cut, (2, 3, 5), (4, 6, 10)) == clip).all()


def test_patches_times_a_matrix_are_a_strided_convolution():
    images = jnp.asarray(RANDOM.standard_normal((2, 6, 20, 3)), jnp.float32)
    kernel = jnp.asarray(RANDOM.standard_normal((3, 4, 3, 7)), jnp.float32)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        images, kernel, (3, 4), "VALID", dimension_numbers=layout, precision="highest"
    )
    found = patches.patchify(images, (3, 4)) @ kernel.reshape(-1, 7)
    np.testing.assert_allclose(found, expected.reshape(2, -1, 7), atol=2e-5)


@pytest.mark.parametrize(("patch", "size"), [((2, 3), (4, 7)), ((2,), (4, 6)), ((0, 3), (4, 6))])
def test_a_patch_that_does_not_divide_is_named(patch, size):
    with pytest.raises(ValueError, match=f"of {'×'.join(map(str, patch))} do not divide .*of 4×"):
        patches.grid_of(size, patch)


def test_the_first_bit_is_the_most_significant():
    bits = jnp.array([[0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
    assert patches.bits_to_tokens(bits).tolist() == [1, 8, 13]
    assert patches.tokens_to_bits(jnp.array([13]), 4).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("k", [1, 4, 11])
def test_bits_and_tokens_are_exact_inverses(k):
    tokens = jnp.arange(2**k)
    bits = patches.tokens_to_bits(tokens, k)
    assert bits.shape == (2**k, k)
    assert (patches.bits_to_tokens(bits) == tokens).all()


def test_thirty_one_bits_fit():
    bits = jnp.ones((2, 31))
    tokens = patches.bits_to_tokens(bits)
    assert tokens.tolist() == [2**31 - 1] * 2
    assert patches.tokens_to_bits(tokens, 31).all()
    with pytest.raises(ValueError, match="k=32"):
        patches.bits_to_tokens(jnp.ones((2, 32)))


def test_a_binary_image_becomes_tokens_and_comes_back():
    images = jnp.asarray(RANDOM.random((5, 28, 28, 1)) > 0.5)
    tokens = patches.bits_to_tokens(patches.patchify(images, (2, 2)))
    assert tokens.shape == (5, 196)
    assert {*np.unique(tokens)} == {*range(16)}
    back = patches.unpatchify(patches.tokens_to_bits(tokens, 4), (2, 2), (28, 28))
    assert (back == images).all()


def test_sizes_that_do_not_fit_are_named_in_the_error():
    with pytest.raises(ValueError, match="2×3 do not divide an image of 4×5"):
        patches.patchify(jnp.zeros((1, 4, 5, 1)), (2, 3))
    with pytest.raises(ValueError, match=r"P=4 .*got P=3"):
        patches.unpatchify(jnp.zeros((1, 3, 6)), (2, 3), (4, 6))
    with pytest.raises(ValueError, match="of 7"):
        patches.unpatchify(jnp.zeros((1, 4, 7)), (2, 3), (4, 6))
