"""Augmentations against NumPy, Pillow, SciPy and colorsys; and what all of them keep."""

import colorsys
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxformer.ops import augment
from jaxformer.ops.augment import chance, geometry

KEY = jax.random.key(7)
PIXELS = np.random.default_rng(0).random((61, 11, 13, 3), np.float32)
RGB, GREY = jnp.asarray(PIXELS), jnp.asarray(PIXELS[..., :1])


AUGMENTATIONS = {
    "affine": lambda key, x: augment.affine(key, x, turn=0.2, shear=0.1, stretch=0.2, shift=2.0),
    "colour_jitter": lambda key, x: augment.colour_jitter(
        key, x, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3, probability=0.8
    ),
    "gaussian_blur": augment.gaussian_blur,
    "random_crop": lambda key, x: augment.random_crop(key, x, 3),
    "random_erase": augment.random_erase,
    "random_flip": augment.random_flip,
    "random_grayscale": augment.random_grayscale,
    "random_resized_crop": lambda key, x: augment.random_resized_crop(
        key, x, (11, 13), method="cubic"
    )[0],
    "solarize": augment.solarize,
}
RESAMPLE = jax.jit(geometry._resample)
CROP = jax.jit(augment.resized_crop, static_argnums=(2, 3))
BOXES = jax.jit(augment.random_boxes, static_argnums=(1, 2, 3, 4))
COMPILED = {name: jax.jit(function) for name, function in AUGMENTATIONS.items()}
EACH = pytest.mark.parametrize("name", AUGMENTATIONS)


@EACH
def test_what_is_drawn_changes_neither_shape_nor_range_nor_the_program(name):
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(AUGMENTATIONS[name], n=1))
    first, again, other = (once(jax.random.key(seed), RGB) for seed in (0, 0, 1))
    chex.assert_equal_shape_prefix([first, RGB], 4)
    for x in (first, other):
        assert x.dtype == jnp.float32
        assert x.min() >= 0
        assert x.max() <= 1 + 1e-6
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@EACH
def test_every_image_has_draws_of_its_own(name):
    copies = jnp.broadcast_to(RGB[:1], RGB.shape)
    changed = np.asarray(COMPILED[name](KEY, copies)).reshape(61, -1)
    kinds = len(np.unique(changed, axis=0))
    few = name in ("random_flip", "random_grayscale", "solarize")
    assert kinds == 2 if few else kinds > 20


@EACH
def test_one_channel_of_bfloat16_changes_as_three_equal_ones_of_float32_do(name):
    narrow = GREY.astype(jnp.bfloat16)
    one = COMPILED[name](KEY, narrow)
    assert (one.shape, one.dtype) == (GREY.shape, jnp.bfloat16)
    three = COMPILED[name](KEY, jnp.repeat(narrow.astype(jnp.float32), 3, axis=-1))
    np.testing.assert_allclose(np.float32(one), three[..., :1], atol=0.01)


@pytest.mark.parametrize(
    "name", ["affine", "colour_jitter", "gaussian_blur", "random_resized_crop"]
)
def test_gradients_are_finite_and_of_grey_pixels_too(name):
    x = RGB.at[:, :5].set(0.5).at[:, 5].set(0.0)

    def loss(x):
        return jnp.square(AUGMENTATIONS[name](KEY, x)).sum()

    gradient = jax.jit(jax.grad(loss))(x)
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).mean() > 0.2


@pytest.mark.parametrize(
    "still",
    [
        lambda x: augment.affine(KEY, x),
        lambda x: augment.colour_jitter(KEY, x),
        lambda x: augment.colour_jitter(KEY, x, hue=0.4, contrast=1.0, probability=0.0),
        lambda x: augment.gaussian_blur(KEY, x, (0.0, 0.0), 1.0),
        lambda x: augment.gaussian_blur(KEY, x, probability=0.0),
        lambda x: augment.random_crop(KEY, x, 0),
        lambda x: augment.random_erase(KEY, x, probability=0.0),
        lambda x: augment.random_flip(KEY, x, 0.0),
        lambda x: augment.random_grayscale(KEY, x, 0.0),
        lambda x: augment.random_resized_crop(KEY, x, (11, 13), area=(1.0, 1.0))[0],
        lambda x: augment.random_resized_crop(KEY, x, (11, 13), area=(1.0, 1.0), method="cubic")[0],
        lambda x: augment.solarize(KEY, x, 1.1, 1.0),
        lambda x: augment.solarize(KEY, x, 0.0, 0.0),
        lambda x: augment.mixup(KEY, x, jnp.eye(len(x)), 0.0)[0],
        lambda x: augment.cutmix(KEY, x, jnp.eye(len(x)), 0.0)[0],
        lambda x: augment.turn_hue(x, jnp.ones(len(x))),
    ],
)
def test_no_strength_changes_nothing(still):
    np.testing.assert_allclose(jax.jit(still)(RGB[:5]), RGB[:5], atol=2e-6)


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize(
    "change",
    [
        lambda x, p: augment.colour_jitter(KEY, x, brightness=0.5, probability=p),
        lambda x, p: augment.gaussian_blur(KEY, x, (1.0, 2.0), p),
        lambda x, p: augment.random_erase(KEY, x, area=(0.2, 0.3), probability=p),
        lambda x, p: augment.random_flip(KEY, x, p),
        lambda x, p: augment.random_grayscale(KEY, x, p),
        lambda x, p: augment.solarize(KEY, x, probability=p),
    ],
)
def test_the_share_of_changed_images_is_the_probability(change, share):
    x = np.random.default_rng(1).random((997, 3, 4, 3), np.float32)
    found = (np.asarray(jax.jit(change, static_argnums=1)(x, share)) != x).any((1, 2, 3)).mean()
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 997)


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_a_crop_is_a_window_of_the_padded_image_and_all_windows_come_up(mode):
    x = jnp.broadcast_to(RGB[:1], (997, 11, 13, 3))
    padded = np.pad(PIXELS[0], ((2, 2), (2, 2), (0, 0)), mode=mode)
    windows = [padded[i : i + 11, j : j + 13] for i in range(5) for j in range(5)]
    crops = np.asarray(augment.random_crop(KEY, x, 2, mode))
    which = [[(crop == window).all() for window in windows].index(True) for crop in crops]
    counts = np.bincount(which, minlength=25)
    assert counts.min() > 0
    assert np.square(counts - 997 / 25).sum() / (997 / 25) < 52  # chi-squared, p > 0.001


def test_a_flip_exchanges_left_and_right():
    np.testing.assert_array_equal(augment.random_flip(KEY, RGB, 1.0), RGB[:, :, ::-1])


@pytest.mark.parametrize("method", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(5, 7), (17, 19)])
def test_a_resized_crop_is_pillows(method, size):
    boxes = np.array([[0, 0, 11, 13], [2.5, 1.25, 6, 9.5], [7.9, 3.3, 2.1, 3.7]], np.float32)
    found = CROP(RGB[:3], boxes, size, method)
    filters = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
    for image, (top, left, height, width), ours in zip(PIXELS, boxes.tolist(), found):
        corners = (left, top, left + width, top + height)
        for channel in range(3):
            theirs = Image.fromarray(image[..., channel]).resize(
                size[::-1], filters[method], corners
            )
            expected = np.clip(np.asarray(theirs), 0, 1)
            np.testing.assert_allclose(ours[..., channel], expected, atol=2e-5)


def test_boxes_lie_in_the_image_and_have_the_shapes_asked_for():
    boxes = np.asarray(BOXES(KEY, 5000, (40, 60), (0.1, 0.5), (0.5, 3.0)))
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= 40 + 1e-4).all()
    assert (left + width <= 60 + 1e-4).all()
    area, aspect = height * width / 2400, width / height
    assert area.min() >= 0.1 - 1e-6
    assert area.max() <= 0.5 + 1e-6
    assert aspect.min() >= 0.5 - 1e-6
    assert aspect.max() <= 3.0 + 1e-5
    for share in (top / (40 - height), left / (60 - width)):
        np.testing.assert_allclose(np.histogram(share, 5, (0, 1))[0] / 5000, 0.2, atol=0.025)


def test_small_boxes_have_uniform_areas_and_log_uniform_aspects():
    boxes = np.asarray(BOXES(KEY, 5000, (40, 60), (0.05, 0.15), (0.25, 4.0)))
    area, aspect = boxes[:, 2] * boxes[:, 3] / 2400, boxes[:, 3] / boxes[:, 2]
    for share in ((area - 0.05) / 0.1, (np.log(aspect) / np.log(4) + 1) / 2):
        np.testing.assert_allclose(np.histogram(share, 5, (0, 1))[0] / 5000, 0.2, atol=0.025)
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("aspect", "greatest"),
    [((0.5, 1.0), [0, 10, 40, 40]), ((1.2, 3.0), [0, 0, 40, 60]), ((2.0, 3.0), [5, 0, 30, 60])],
)
def test_where_no_shape_fits_the_greatest_in_the_middle_is_taken(aspect, greatest):
    boxes = BOXES(KEY, 3, (40, 60), (1.0, 1.0), aspect)
    np.testing.assert_allclose(boxes, np.tile(np.float32(greatest), (3, 1)), atol=1e-4)


def test_a_random_resized_crop_is_the_crop_of_the_boxes_it_returns():
    crops, boxes = jax.jit(augment.random_resized_crop, static_argnums=2)(KEY, RGB, (5, 7))
    np.testing.assert_allclose(crops, CROP(RGB, boxes, (5, 7)), atol=1e-6)
    expected = BOXES(KEY, 61, (11, 13), (0.08, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_allclose(boxes, expected, rtol=1e-5)


def test_a_slope_of_grey_is_read_where_the_affine_map_points():
    row, column = np.mgrid[-9:10, -11:12].astype(np.float32)
    slope = 0.5 + 0.013 * row + 0.007 * column  # linear: interpolation is exact
    limits = {"turn": 0.2, "shear": 0.1, "stretch": 0.15, "shift": 1.5}
    x = jnp.broadcast_to(slope[None, ..., None], (5, 19, 23, 1))
    changed = jax.jit(functools.partial(augment.affine, **limits))(KEY, x)
    reach = np.array([0.2, 0.1, 0.15, 0.15, 1.5, 1.5])[:, None]
    draws = reach * np.asarray(jax.random.uniform(KEY, (6, 5), minval=-1, maxval=1))
    for image, (turn, shear, wide, tall, right, down) in zip(changed, draws.T):
        source_row = (1 + tall) * row - turn * column + down
        source_column = (1 + wide) * column + (turn + shear) * source_row + right
        expected = 0.5 + 0.013 * source_row + 0.007 * source_column
        inner = np.s_[6:-6, 6:-6]
        np.testing.assert_allclose(image[..., 0][inner], expected[inner], atol=1e-5)


def test_a_pure_shift_moves_the_picture():
    zero = jnp.zeros((61, 1, 1))
    moved = RESAMPLE(RGB, zero, zero, zero + 2.0)
    np.testing.assert_allclose(moved[:, :, :-2], RGB[:, :, 2:], atol=1e-6)
    np.testing.assert_allclose(moved[:, :, -2:], 0)


def test_slanting_a_vertical_line_makes_a_slope():
    line = jnp.zeros((1, 28, 28, 1)).at[:, :, 13:15].set(1.0)
    quarter = jnp.full((1, 1, 1), 0.25)
    slope = RESAMPLE(line, quarter, 0 * quarter, 0 * quarter)[0, ..., 0]
    centre = (slope * jnp.arange(28)[None]).sum(-1) / slope.sum(-1)
    np.testing.assert_allclose(jnp.diff(centre), -0.25, atol=0.01)


def test_stretching_an_axis_is_linear_interpolation():
    wide = jnp.full((61, 1, 1), 0.3)
    found = RESAMPLE(GREY, 0 * wide, wide, 0 * wide)
    row, column = np.mgrid[:11, :13].astype(float)
    for image, ours in zip(PIXELS[..., 0], found[..., 0]):
        places = [row, 6 + 1.3 * (column - 6)]
        theirs = ndimage.map_coordinates(image, places, order=1, mode="grid-constant")
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def grey(x):
    return x @ np.array([[0.2989], [0.587], [0.114]]) if x.shape[-1] == 3 else x


def blend(x, other, factor):
    return np.clip(factor * x + (1 - factor) * other, 0, 1)


def turned(x, turn):
    if x.shape[-1] == 1:
        return x
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3).tolist()]
    return np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in pixels]).reshape(
        x.shape
    )


REFERENCES = [  # of torchvision.transforms.functional, for one image
    lambda x, factor: np.clip(factor * x, 0, 1),
    lambda x, factor: blend(x, grey(x).mean(), factor),
    lambda x, factor: blend(x, grey(x), factor),
    turned,
]
OURS = (augment.scale_brightness, augment.scale_contrast, augment.scale_saturation)


@pytest.mark.parametrize("images", [PIXELS, PIXELS[..., :1]], ids=["rgb", "grey"])
@pytest.mark.parametrize("which", range(4))
def test_colours_change_by_the_formulas_of_torchvision(which, images):
    x = images[:6].copy()
    x[0, :3] = np.round(x[0, :3])  # pure colours, black and white
    x[1, :3] = x[1, :3, :, :1]  # grey
    factors = np.array([-0.5, -0.2, 0.0, 0.1, 0.3, 0.5], np.float32)
    factors = factors if which == 3 else 2 * np.abs(factors)
    found = (*OURS, augment.turn_hue)[which](jnp.asarray(x), jnp.asarray(factors))
    for image, factor, ours in zip(x, factors, found):
        expected = REFERENCES[which](image.astype(float), float(factor))
        np.testing.assert_allclose(ours, np.broadcast_to(expected, image.shape), atol=3e-6)


def test_jitter_is_its_four_changes_in_an_order_that_varies():
    strengths = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.6, "hue": 0.2}
    jitter = jax.jit(lambda key, x: augment.colour_jitter(key, x, **strengths))
    x, orders = PIXELS[:2, :4, :3], set()
    for seed in range(5):
        key = jax.random.key(seed)
        draws = np.asarray(jax.random.uniform(jax.random.split(key, 3)[1], (4, 2)))
        low = np.array([0.6, 0.0, 0.4, -0.2])[:, None]  # a contrast is not negative
        factors = low + (np.array([1.4, 2.5, 1.6, 0.2])[:, None] - low) * draws
        found = jitter(key, jnp.asarray(x))
        for order in itertools.permutations(range(4)):
            expected = x.astype(float)
            for which in order:
                expected = np.stack(
                    [REFERENCES[which](image, f) for image, f in zip(expected, factors[which])]
                )
            if np.allclose(found, expected, atol=1e-5):
                orders.add(order)
                break
        else:
            pytest.fail(f"seed {seed}: no order of the four changes gives this")
    assert len(orders) > 2


def test_grey_and_solarized_images_are_the_formulas():
    expected = np.broadcast_to(grey(PIXELS), RGB.shape)
    np.testing.assert_allclose(augment.random_grayscale(KEY, RGB, 1.0), expected, atol=1e-6)
    np.testing.assert_array_equal(augment.random_grayscale(KEY, GREY, 1.0), GREY)
    solarized = augment.solarize(KEY, RGB, 0.7, 1.0)
    np.testing.assert_allclose(solarized, np.where(PIXELS >= 0.7, 1 - PIXELS, PIXELS), atol=1e-7)
    at = jnp.full((1, 1, 1, 1), 0.75)
    assert augment.solarize(KEY, at, 0.75, 1.0)[0, 0, 0, 0] == 0.25


def test_a_blur_is_scipys_with_weights_brought_to_one_at_the_border():
    blurred = jax.jit(augment.gaussian_blur, static_argnums=(2, 3))(KEY, RGB, (0.3, 2.0), 1.0)
    widths = jax.random.uniform(jax.random.split(KEY)[0], (61,), minval=0.3, maxval=2.0)
    for image, width, ours in zip(PIXELS[:9], np.asarray(widths), blurred):
        options = {"sigma": (width, width, 0), "mode": "constant", "radius": (12, 12, 0)}
        theirs = ndimage.gaussian_filter(image.astype(float), **options)
        inside = ndimage.gaussian_filter(np.ones_like(image, float), **options)
        np.testing.assert_allclose(ours, theirs / inside, atol=1e-5)


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixing_keeps_shapes_and_dtypes(mix):
    given = GREY.astype(jnp.bfloat16), jnp.eye(61, 7)
    found = jax.eval_shape(lambda key, *given: mix(key, *given, 0.3), KEY, *given)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, given)


def test_mixup_mixes_labels_as_it_mixes_images():
    count = 499
    x = np.random.default_rng(2).random((count, 3, 2, 3), np.float32)
    images, labels = map(
        np.asarray, jax.jit(augment.mixup, static_argnums=3)(KEY, x, jnp.eye(count), 0.4)
    )
    np.testing.assert_allclose(images, np.tensordot(labels, x, 1), atol=1e-5)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(labels.sum(0).mean(), 1, atol=1e-6)
    assert ((labels > 0).sum(1) <= 2).all()
    partners = np.where(np.eye(count) > 0, 0, labels).argmax(1)
    assert len(set(partners)) > 0.9 * count  # a permutation, but for those mixed with themselves
    share = np.diag(labels)[partners != 0]
    assert abs(share.mean() - 0.5) < 4 * np.sqrt(1 / (4 * 1.8 * count))  # Beta(0.4, 0.4)
    assert share.var() == pytest.approx(1 / (4 * 1.8), rel=0.15)


def test_cutmix_pastes_a_box_and_mixes_labels_by_its_area():
    images, labels = map(
        np.asarray, jax.jit(augment.cutmix, static_argnums=3)(KEY, RGB, jnp.eye(61), 1.0)
    )
    shares = []
    for row, (image, label) in enumerate(zip(images, labels)):
        partner = np.where(np.arange(61) == row, 0, label).argmax()
        own = (image == PIXELS[row]).all(-1)
        if own.all():
            assert label[row] == pytest.approx(1, abs=1e-6)
            continue
        np.testing.assert_array_equal(image[~own], PIXELS[partner][~own])
        rows, columns = (~own).any(1), (~own).any(0)
        np.testing.assert_array_equal(~own, rows[:, None] & columns[None])  # a rectangle
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
        assert label[row] == pytest.approx(own.mean(), abs=1e-6)
        assert label.sum() == pytest.approx(1, abs=1e-6)
        shares.append(own.mean())
    assert np.std(shares) > 0.15
    assert 0.5 < np.mean(shares) < 0.9  # half of the image, less what was cut off


def test_erasing_paints_one_box_of_the_share_asked_for():
    x = np.random.default_rng(3).random((61, 40, 60, 1), np.float32)
    erased = np.asarray(
        augment.random_erase(KEY, jnp.asarray(x), area=(0.1, 0.2), fill=0.25, probability=1.0)
    )
    gone = (erased == 0.25)[..., 0]
    np.testing.assert_array_equal(erased[~gone], x[~gone])
    for mask in gone:
        np.testing.assert_array_equal(mask, mask.any(1)[:, None] & mask.any(0)[None])
        assert 0.08 < mask.mean() < 0.22  # whole pixels of a box that is not rounded
    assert np.ptp(gone.mean((1, 2))) > 0.05
    assert len(np.unique(gone.any(2).argmax(1))) > 10  # tops


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: augment.random_crop(KEY, RGB, -1), "padding=-1"),
        (lambda: augment.random_flip(KEY, RGB, 1.5), "probability=1.5"),
        (lambda: augment.random_erase(KEY, RGB, area=(0.0, 0.5)), r"area=\(0.0, 0.5\)"),
        (lambda: augment.random_erase(KEY, RGB, area=(0.6, 0.5)), r"area=\(0.6, 0.5\)"),
        (
            lambda: augment.random_resized_crop(KEY, RGB, (4, 4), area=(0.6, 1.5)),
            r"area=\(0.6, 1.5\)",
        ),
        (lambda: augment.random_erase(KEY, RGB, aspect=(0.0, 2.0)), r"aspect=\(0.0, 2.0\)"),
        (lambda: augment.random_erase(KEY, RGB, aspect=(3.0, 2.0)), r"aspect=\(3.0, 2.0\)"),
        (lambda: augment.gaussian_blur(KEY, RGB, (-1.0, 2.0)), r"sigma=\(-1.0, 2.0\)"),
        (lambda: augment.gaussian_blur(KEY, RGB, (3.0, 2.0)), r"sigma=\(3.0, 2.0\)"),
        (lambda: augment.colour_jitter(KEY, RGB, hue=0.6), "hue=0.6"),
        (lambda: augment.colour_jitter(KEY, RGB, contrast=-0.1), "contrast=-0.1"),
        (lambda: augment.colour_jitter(KEY, RGB[..., :2], hue=0.1), "C=2"),
        (lambda: augment.turn_hue(RGB[..., :2], jnp.ones(61)), "C=2"),
        (lambda: augment.random_grayscale(KEY, RGB[..., :2]), "C=2"),
        (lambda: augment.mixup(KEY, RGB, jnp.eye(61), -1.0), "alpha=-1.0"),
        (lambda: augment.cutmix(KEY, RGB, jnp.eye(61), -1.0), "alpha=-1.0"),
    ],
)
def test_what_cannot_be_is_told_with_its_number(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="floats in \\[0, 1\\], got uint8"):
        chance.check_light(RGB, jnp.zeros((2, 3, 3, 1), jnp.uint8))
