"""How thick the strokes of digits are and how they lean, as against others of the same digit."""

import dataclasses

import numpy as np

from jaxformer.typing import Float, Int

STROKES = ("thin", "medium", "thick")
SLANTS = ("leaning left", "upright", "leaning right")


@dataclasses.dataclass(frozen=True)
class Measure:
    """Tells strokes and slants of digits by what divides a digit's training images in thirds.

    Attributes:
        strokes: Two widths for each digit, in pixels.
        slants: Two slants for each digit.
    """

    strokes: Float[np.ndarray, "10 2"]
    slants: Float[np.ndarray, "10 2"]

    @classmethod
    def of(cls, ink: Float[np.ndarray, "n 28 28"], labels: Int[np.ndarray, " n"]) -> "Measure":
        """Measures images with ink from 0 to 1, of which there is at least one of each digit."""
        found = stroke(ink), slant(ink)
        parts = (
            np.stack([np.quantile(x[labels == digit], [1 / 3, 2 / 3]) for digit in range(10)])
            for x in found
        )
        return cls(*parts)

    def read(
        self, ink: Float[np.ndarray, "n 28 28"], labels: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The places in `STROKES` and in `SLANTS` of digits that are what the labels say."""
        read = (
            (values[:, None] > bounds[labels]).sum(axis=1)
            for values, bounds in ((stroke(ink), self.strokes), (slant(ink), self.slants))
        )
        strokes, slants = read
        return strokes, slants


def stroke(ink: Float[np.ndarray, "n 28 28"]) -> Float[np.ndarray, " n"]:
    """Width of the strokes in pixels: twice the area over the length of the outline."""
    black = np.pad(ink > 0.5, [(0, 0), (1, 1), (1, 1)])
    outline = sum((black != np.roll(black, 1, axis)).sum(axis=(1, 2)) for axis in (1, 2))
    return 2 * black.sum(axis=(1, 2)) / np.maximum(1, outline)


def slant(ink: Float[np.ndarray, "n 28 28"]) -> Float[np.ndarray, " n"]:
    """How far the ink goes right for each pixel that it goes up, by its second moments."""
    place = np.arange(ink.shape[-1], dtype=np.float32)
    total = np.maximum(ink.sum(axis=(1, 2)), 1e-6)
    right = place[None] - (ink.sum(axis=1) @ place / total)[:, None]
    down = place[None] - (ink.sum(axis=2) @ place / total)[:, None]
    mixed = np.einsum("nyx,ny,nx->n", ink, down, right)
    return -mixed / np.maximum(np.einsum("nyx,ny->n", ink, down**2), 1e-6)
