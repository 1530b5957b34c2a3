"""Strokes and slants are measured as they were drawn, and told as against others of a digit."""

import numpy as np

from experiments import strokes
from experiments.strokes import Measure


def bar(width, lean):
    """A stroke of a width in pixels that goes `lean` pixels right for each that it goes up."""
    rows, columns = np.mgrid[:28, :28] - 13.5
    inside = (np.abs(columns + lean * rows) <= width / 2) & (np.abs(rows) < 10)
    return inside.astype(np.float32)


def test_a_width_is_measured_in_pixels_and_a_slant_as_it_was_drawn():
    ink = np.stack([bar(2, 0.0), bar(4, 0.0), bar(4, 0.5), bar(4, -0.3)])
    np.testing.assert_allclose(strokes.stroke(ink)[:2], [2, 4], rtol=0.25)
    np.testing.assert_allclose(strokes.slant(ink), [0, 0, 0.5, -0.3], atol=0.03)
    nothing = np.zeros((1, 28, 28), np.float32)
    assert strokes.stroke(nothing) == strokes.slant(nothing) == 0


def test_thirds_of_each_digit_are_thin_medium_and_thick():
    numbers = np.arange(90)
    wide = np.stack([bar(2 * (n // 10) + 2, 0.0) for n in numbers])
    lean = np.stack([bar(3, n // 10 / 8 - 0.5) for n in numbers])
    widths, _ = Measure.of(wide, numbers % 10).read(wide, numbers % 10)
    _, slants = Measure.of(lean, numbers % 10).read(lean, numbers % 10)
    np.testing.assert_array_equal(widths, numbers // 30)
    np.testing.assert_array_equal(slants, numbers // 30)
