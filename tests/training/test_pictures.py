"""Pictures show what they were given, and leave matplotlib's global state alone."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from jaxformer.training import pictures

ROWS = [{"step": 50 * i + 1, "loss": 60 + 140 * math.exp(-i / 9)} for i in range(80)]
ROWS += [{"step": 50 * i + 1, "test": 63 + 130 * math.exp(-i / 9)} for i in range(9, 80, 10)]


def test_a_grid_shows_every_image_at_its_place(tmp_path):
    path = tmp_path / "grid.png"
    images = np.zeros((3, 5, 28, 28), np.uint8)
    images[1, 4] = 255
    pictures.digit_grid(images, path)
    dark = image.imread(path)[..., :3].mean(-1) < 0.5
    down, across = np.nonzero(dark)
    assert dark.sum() == pytest.approx((3 * 28) ** 2, rel=0.05)  # three dots a pixel
    assert np.mean(down) / dark.shape[0] == pytest.approx(0.5, abs=0.03)
    assert np.mean(across) / dark.shape[1] == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float32])
def test_binary_images_of_any_dtype_look_the_same(kind, tmp_path):
    binary = np.arange(2 * 3 * 28 * 28).reshape(2, 3, 28, 28) % 3 == 0
    pictures.digit_grid(binary.astype(kind), tmp_path / "one.png", row_labels=["0", "1"])
    grey = np.where(binary, 255, 0).astype(np.uint8)
    pictures.digit_grid(grey, tmp_path / "two.png", row_labels=["0", "1"])
    np.testing.assert_array_equal(
        image.imread(tmp_path / "one.png"), image.imread(tmp_path / "two.png")
    )


def test_labels_must_match_the_rows(tmp_path):
    with pytest.raises(ValueError, match="3 labels for 2 rows"):
        pictures.digit_grid(np.zeros((2, 1, 5, 5)), tmp_path / "x.png", row_labels=list("abc"))


def pixels(path):
    return np.round(image.imread(path)[..., :3] * 255).astype(np.uint8)


def boxes(picture):
    """Top, left, bottom and right of what is not white, its outermost dots."""
    rows, columns = np.nonzero((picture != 255).any(-1))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


@pytest.mark.parametrize("size", [(8, 7), (28, 28), (32, 30), (101, 83)])
def test_colours_are_kept_and_pixels_are_squares(size, tmp_path):
    images = np.random.default_rng(3).integers(250, size=(2, 3, *size, 3), dtype=np.uint8)
    pictures.image_grid(images, tmp_path / "grid.png")
    picture = pixels(tmp_path / "grid.png")
    top, left, bottom, right = boxes(picture)
    assert (top, left) == (12, 12)
    assert picture.shape[:2] == (bottom + 12, right + 12)
    zoom = max(1, round(84 / max(size)))
    gap = (bottom - top - 2 * zoom * size[0], (right - left - 3 * zoom * size[1]) / 2)
    assert gap[0] == gap[1] > 0
    for row, column in np.ndindex(2, 3):
        corner = picture[top + row * (zoom * size[0] + gap[0]) :]
        corner = corner[:, left + column * (zoom * size[1] + int(gap[1])) :]
        shown = corner[: zoom * size[0], : zoom * size[1]]
        np.testing.assert_array_equal(shown, images[row, column].repeat(zoom, 0).repeat(zoom, 1))


def test_grey_images_and_floats_look_like_their_bytes_in_three_channels(tmp_path):
    grey = np.random.default_rng(4).integers(256, size=(2, 3, 11, 13), dtype=np.uint8)
    pictures.image_grid(np.stack([grey] * 3, -1), tmp_path / "rgb.png", column_labels="xyz")
    for images in (grey, grey[..., None], grey / 255, np.where(grey == 255, np.inf, grey / 255)):
        pictures.image_grid(images, tmp_path / "grey.png", column_labels="xyz")
        np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), pixels(tmp_path / "rgb.png"))


def test_labels_and_title_move_no_pixel_and_overlap_nothing(tmp_path):
    images = np.zeros((2, 3, 9, 9), np.uint8)
    pictures.image_grid(images, tmp_path / "bare.png")
    words = {"column_labels": ["a", "W" * 19, "c"], "row_labels": ["original", "hidden"]}
    pictures.image_grid(images, tmp_path / "told.png", title="A title " * 20, **words)
    bare, told = pixels(tmp_path / "bare.png"), pixels(tmp_path / "told.png")
    assert boxes(told)[1] >= 9  # dots of margin that stay white, whatever is written
    assert told.shape[1] - boxes(told)[3] >= 9
    black = (told == 0).all(-1)
    assert bare.shape[0] == 2 * 81 + 9 + 24  # margins of 12
    for below in (12, 12 + 81 + 9):
        columns = np.flatnonzero(black[-below - 81 : -below].all(0))
        assert columns.size == 3 * 81
        assert np.diff(columns).max() > 2 * 81  # apart, as the long label needs


@pytest.mark.parametrize(
    ("shape", "labels", "told"),
    [
        ((2, 3, 4, 4, 2), {}, r"C=1 or C=3 if any; got \(2, 3, 4, 4, 2\)"),
        ((2, 0, 4, 4), {}, r"got \(2, 0, 4, 4\)"),
        ((2, 3, 4, 4), {"column_labels": ["a"]}, "1 labels for 3 columns"),
        ((2, 3, 4, 4, 3), {"row_labels": ["a"]}, "1 labels for 2 rows"),
    ],
)
def test_what_makes_no_grid_is_told(shape, labels, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        pictures.image_grid(np.zeros(shape), tmp_path / "x.png", **labels)


def test_heat_is_red_on_the_greatest_weight_and_grey_on_the_least():
    images = np.full((2, 6, 12, 3), [0.9, 0.3, 0.0])
    maps = np.full((2, 6), -7.0)
    maps[1, 2:4] = [3.0, -2.0]  # the end of the first row of 3 patches, the start of the second
    hot = pictures.heat(images, maps, (3, 4))
    np.testing.assert_allclose(hot[0], 0.4)  # equal weights: no heat
    red = 0.15 * 0.4 + 0.85 * np.array([1.0, 0.15, 0.0])
    np.testing.assert_allclose(hot[1, :3, 8:], np.broadcast_to(red, (3, 4, 3)))
    np.testing.assert_allclose(hot[1, 3:, :4], np.broadcast_to((red + 0.4) / 2, (3, 4, 3)))
    np.testing.assert_allclose(hot[1, :3, :8], 0.4)
    np.testing.assert_allclose(hot[1, 3:, 4:], 0.4)
    whole = pictures.heat((images * 255).astype(np.uint8), maps, (3, 4))
    np.testing.assert_allclose(whole, hot, atol=1 / 255)


def test_hidden_patches_are_grey_and_the_rest_is_untouched():
    images = np.random.default_rng(6).integers(256, size=(2, 6, 12, 3), dtype=np.uint8)
    hidden = np.zeros((2, 6), bool)
    hidden[1, 5] = True  # the last of 2 rows of 3 patches
    for x, half in ((images, 128), (images / np.float32(255), 0.5)):
        shown = pictures.hide(x, hidden, (3, 4))
        assert shown.dtype == x.dtype
        assert (shown[1, 3:, 8:] == half).all()
        np.testing.assert_array_equal(shown[1, :, :8], x[1, :, :8])
        np.testing.assert_array_equal(shown[1, :3], x[1, :3])
        np.testing.assert_array_equal(shown[0], x[0])
    ones = pictures.hide((images > 99).astype(np.uint8), hidden, (3, 4))
    assert (ones[1, 3:, 8:] == 0.5).all()
    np.testing.assert_array_equal(ones[0], images[0] > 99)


@pytest.mark.parametrize(("lay", "dtype"), [(pictures.heat, float), (pictures.hide, bool)])
@pytest.mark.parametrize(("count", "patch"), [(5, (3, 4)), (6, (4, 4)), (6, (3, 5))])
def test_patches_that_do_not_cover_the_image_are_told(lay, dtype, count, patch):
    with pytest.raises(ValueError, match=rf"P={count} patches of {patch[0]}×{patch[1]} .* 6×12"):
        lay(np.zeros((2, 6, 12, 1)), np.zeros((2, count), dtype), patch)


def test_bars_are_as_high_as_their_values_and_stand_in_order(tmp_path):
    heights = []
    for values in ([0, 4, 2], [4, 2, 0]):
        pictures.bars(np.array(values), tmp_path / "bars.png", labels="abc", unit="uses")
        blue = pixels(tmp_path / "bars.png")[..., 2] > pixels(tmp_path / "bars.png")[..., 0] + 50.0
        heights.append([third.any(1).sum() for third in np.array_split(blue, 3, axis=1)])
    assert heights[0][0] == heights[1][2] == 0
    assert heights[0][1] == heights[1][0] == pytest.approx(2 * heights[0][2], abs=2)
    with pytest.raises(ValueError, match="2 labels for 3 bars"):
        pictures.bars(np.arange(3), tmp_path / "bars.png", labels="ab")


def test_a_curve_is_drawn_from_metrics_and_evaluations(tmp_path):
    pictures.loss_curve(ROWS, tmp_path / "both.png", evaluations=["test"])
    pictures.loss_curve(ROWS, tmp_path / "one.png")
    both, one = (image.imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape == one.shape
    assert (both != one).any()
    names = ["a", "b", "c", "d", "test"]
    pictures.loss_curve(ROWS, tmp_path / "five.png", evaluations=names)
    assert (image.imread(tmp_path / "five.png") != one).any()


@pytest.mark.parametrize("rows", [ROWS[:1], [{"step": 1, "loss": -1.0}, {"step": 2, "loss": 0.0}]])
def test_short_and_negative_curves_are_drawn_too(rows, tmp_path):
    pictures.loss_curve(rows, tmp_path / "loss.png", evaluations=["absent"])
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_no_training_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'loss'"):
        pictures.loss_curve([{"step": 1, "test": 2.0}], tmp_path / "loss.png")


def test_smoothing_keeps_lines_and_ends():
    line = np.linspace(3.0, 8.0, 83)
    np.testing.assert_allclose(pictures._smooth(line), line, rtol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=83)
    smooth = pictures._smooth(noisy)
    assert np.std(smooth - line) < 0.7 * np.std(noisy - line)


def test_pictures_need_neither_pyplot_nor_a_display(tmp_path):
    script = (
        "import sys; from jaxformer.training import pictures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import numpy as np; pictures.digit_grid(np.zeros((1, 1, 5, 5)), sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "grid.png")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"False\n"
