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


def test_a_curve_is_drawn_from_metrics_and_evaluations(tmp_path):
    pictures.loss_curve(ROWS, tmp_path / "both.png", evaluations=["test"])
    pictures.loss_curve(ROWS, tmp_path / "one.png")
    both, one = (image.imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape == one.shape
    assert (both != one).any()


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
