"""Pictures of a run: its loss curve, and grids of digits. No window and no global state is used."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformer.typing import Shaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.05  # of the curve's length


def loss_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    train: str = "loss",
    evaluations: Sequence[str] = (),
    unit: str = "nats per image",
) -> None:
    """Draws the loss over the steps as a PNG: each logged value, their running mean, evaluations.

    Both axes are logarithmic where the values allow it and span more than a factor of three.

    Args:
        rows: Of a `metrics.jsonl`; a row without a metric is skipped for that metric.
        path: The picture.
        train: Metric of the training loss.
        evaluations: Metrics to be drawn as points beside it, in the same unit.
        unit: Of the loss.

    Raises:
        ValueError: If no row has the training loss.
    """
    steps, losses = _series(rows, train)
    if not steps.size:
        raise ValueError(f"No row has the metric {train!r}: there is no curve to draw.")
    figure = _figure(7.0, 4.2)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    drawn = [losses]
    for name, colour in zip(evaluations, ("tab:orange", "tab:green", "tab:red", "tab:purple")):
        at, values = _series(rows, name)
        axes.plot(at, values, "o-", color=colour, markersize=4, linewidth=1, label=name)
        drawn.append(values)
    values = np.concatenate(drawn)
    if _wide(values, factor=3):
        # Between the powers of ten there is room for most labels on a short axis, for two on a long
        labelled = "25" if _wide(values, factor=10) else "234568"
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in labelled else "")
    if _wide(steps, factor=3):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("steps")
    axes.set_ylabel(unit)
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(os.fspath(path), dpi=130)


def digit_grid(
    images: Shaped[np.ndarray, "rows columns height width"],
    path: str | os.PathLike[str],
    *,
    row_labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws images as a grid in a PNG, ink dark on white paper, one row of the array a row.

    Args:
        images: No ink is 0; the most ink is 1 for booleans and floats, 255 for uint8 unless no
            pixel is above 1, as in binary images.
        path: The picture.
        row_labels: One text a row, written to its left, or none.
        title: One line above.

    Raises:
        ValueError: If there are labels, but not one for each row.
    """
    rows, columns, height, width = images.shape
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels for {rows} rows of images.")
    full = 255 if images.dtype == np.uint8 and images.max(initial=0) > 1 else 1
    gap = max(2, height // 9)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = images[row, column] / full

    scale = 0.016  # inches a pixel: three dots of the picture for each pixel of a digit
    margins = {"left": 0.35 if row_labels else 0.1, "top": 0.4 if title else 0.1, "edge": 0.1}
    inner = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    outer = (inner[0] + margins["left"] + margins["edge"], inner[1] + margins["top"] + 0.1)
    figure = _figure(*outer)
    box = (margins["left"] / outer[0], 0.1 / outer[1], inner[0] / outer[0], inner[1] / outer[1])
    axes = figure.add_axes(box)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    centres = np.arange(len(row_labels)) * (height + gap) + (height - 1) / 2
    axes.set_yticks(centres, labels=list(row_labels))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.1 / outer[1], va="top")
    figure.savefig(os.fspath(path), dpi=3 / scale)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Takes the mean of a window around each value, narrower towards both ends."""
    reach = np.minimum(np.arange(values.size), np.arange(values.size)[::-1])
    reach = np.minimum(reach, math.ceil(_SMOOTHING * values.size / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(values.size)
    return (total[centre + reach + 1] - total[centre - reach]) / (2 * reach + 1)


def _wide(values: np.ndarray, factor: int) -> bool:
    return bool(values.min() > 0 and values.max() > factor * values.min())
