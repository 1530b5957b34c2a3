"""Pictures of a run: loss curve, bars, grids of images. No window and no global state is used."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformer.typing import Bool, Float, Shaped, UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.05  # of the curve's length
_COLOURS = ("tab:orange", "tab:green", "tab:red", "tab:purple")
_DPI = 128  # a power of two, so that whole dots stay whole in inches


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
    from matplotlib.ticker import MaxNLocator

    steps, losses = _series(rows, train)
    if not steps.size:
        raise ValueError(f"No row has the metric {train!r}: there is no curve to draw.")
    figure = _figure(7.0, 4.2)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    drawn = [losses]
    for name, colour in zip(evaluations, itertools.cycle(_COLOURS)):
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
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("steps")
    axes.set_ylabel(unit)
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(os.fspath(path))


def bars(
    values: Shaped[np.ndarray, " n"],
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] = (),
    unit: str = "",
    title: str = "",
) -> None:
    """Draws numbers as bars in a PNG, in their order: how often each entry of a codebook is used.

    Args:
        values: Heights of the bars; from 60 bars on they touch.
        path: The picture.
        labels: One text a bar, written below it; without them bars are numbered from 0.
        unit: Of the values.
        title: One line above.

    Raises:
        ValueError: If there are labels, but not one for each bar.
    """
    if labels and len(labels) != len(values):
        raise ValueError(f"{len(labels)} labels for {len(values)} bars.")
    figure = _figure(7.0, 3.2)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.bar(np.arange(len(values)), values, width=1.0 if len(values) >= 60 else 0.8)
    axes.margins(x=0.01)
    if labels:
        axes.set_xticks(np.arange(len(values)), labels=list(labels))
        axes.tick_params(axis="x", length=0, rotation=90 if len("".join(labels)) > 70 else 0)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(os.fspath(path))


def digit_grid(
    images: Shaped[np.ndarray, "rows columns height width"],
    path: str | os.PathLike[str],
    *,
    row_labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws images as `image_grid` does, but ink dark on white paper.

    Args:
        images: No ink is 0; the most ink is 1 for booleans and floats, 255 for uint8 unless no
            pixel is above 1, as in binary images.
        path: The picture.
        row_labels: One text a row, written to its left, or none.
        title: One line above.

    Raises:
        ValueError: If there is no image, or labels are not one for each row.
    """
    image_grid(1 - _unit(images), path, row_labels=row_labels, title=title)


def image_grid(
    images: Shaped[np.ndarray, "rows columns height width *C"],
    path: str | os.PathLike[str],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws images as a grid in a PNG, in their own colours, one row of the array a row.

    Small images are enlarged by a whole factor, every pixel a square of one colour. Columns move
    apart where their labels need the room.

    Args:
        images: Grey (no C, or C=1) or RGB (C=3). 0 is black; full light is 1 for booleans and
            floats, which are cut to [0, 1], and 255 for uint8 unless no value is above 1.
        path: The picture.
        row_labels: One text a row, written to its left, or none.
        column_labels: One text a column, written above it, or none.
        title: One line above all.

    Raises:
        ValueError: If there is no image, C is neither 1 nor 3, or labels are not one for each row
            or column.
    """
    rows, columns, *size = images.shape
    if not images.size or size[2:] not in ([], [1], [3]):
        raise ValueError(f"A grid needs images, with C=1 or C=3 if any; got {images.shape}.")
    for labels, count, name in ((row_labels, rows, "rows"), (column_labels, columns, "columns")):
        if labels and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} {name} of images.")
    zoom = max(1, round(84 / max(size[:2])))
    height, width = zoom * size[0], zoom * size[1]
    down = height + max(6, height // 9)
    across = max(width + down - height, 8 + math.ceil(max(map(_length, column_labels), default=0)))
    sheet = np.full((rows * down, columns * across, 3), 255, np.uint8)
    light = np.round(255 * _unit(images)).astype(np.uint8).reshape(rows, columns, *size[:2], -1)
    for row, column in np.ndindex(rows, columns):
        image = light[row, column].repeat(zoom, axis=0).repeat(zoom, axis=1)
        sheet[row * down :, column * across :][:height, :width] = image
    sheet = sheet[: rows * down - (down - height), : columns * across - (across - width)]
    texts = [(-8.0, row * down + height / 2, text, "right") for row, text in enumerate(row_labels)]
    for column, text in enumerate(column_labels):
        texts.append((column * across + width / 2, -14.0, text, "center"))
    texts.append((sheet.shape[1] / 2, -38.0 if column_labels else -14.0, title, "center"))
    _write(sheet, texts, path)


def heat(
    images: Shaped[np.ndarray, "*B height width C"],
    maps: Float[np.ndarray, "*B P"],
    patch: tuple[int, int],
) -> Float[np.ndarray, "*B height width 3"]:
    """Lays weights over the patches of images: grey where the weight is least, red where greatest.

    Args:
        images: As `image_grid` takes them.
        maps: A weight for each of the P patches, rows of patches first, such as the attention of
            the class token; stretched image by image from its least to its greatest, and not at
            all if all are equal.
        patch: Height and width of a patch in pixels.

    Returns:
        RGB in [0, 1].

    Raises:
        ValueError: If P patches do not cover the image.
    """
    least = maps.min(-1, keepdims=True)
    reach = maps.max(-1, keepdims=True) - least
    weight = _spread((maps - least) / np.where(reach > 0, reach, 1), images.shape, patch)
    grey = _unit(images).mean(-1, keepdims=True)
    return grey + 0.85 * weight * (np.array([1.0, 0.15, 0.0]) - grey)


def hide(
    images: Shaped[np.ndarray, "*B height width C"],
    hidden: Bool[np.ndarray, "*B P"],
    patch: tuple[int, int],
) -> Shaped[np.ndarray, "*B height width C"]:
    """Paints hidden patches half grey, and leaves the others as they are.

    Args:
        images: uint8, or floats in [0, 1]. Bytes of which none is above 1 become floats.
        hidden: Which of the P patches, rows of patches first, are not to be seen.
        patch: Height and width of a patch in pixels.

    Raises:
        ValueError: If P patches do not cover the image.
    """
    if images.dtype == np.uint8 and images.max(initial=0) <= 1:
        images = images.astype(np.float32)
    half = 128 if images.dtype == np.uint8 else 0.5
    return np.where(_spread(hidden, images.shape, patch), half, images).astype(images.dtype)


def _spread(patches: np.ndarray, shape: tuple[int, ...], patch: tuple[int, int]) -> np.ndarray:
    """Gives each pixel, with C=1, the number of its patch."""
    (height, width), (ph, pw) = shape[-3:-1], patch
    count = patches.shape[-1]
    if height % ph or width % pw or count != (height // ph) * (width // pw):
        raise ValueError(f"P={count} patches of {ph}×{pw} do not cover an image {height}×{width}.")
    grid = patches.reshape(*patches.shape[:-1], height // ph, width // pw, 1)
    return grid.repeat(ph, axis=-3).repeat(pw, axis=-2)


def _unit(images: np.ndarray) -> np.ndarray:
    """Brings images to floats in [0, 1], whatever their dtype."""
    full = 255 if images.dtype == np.uint8 and images.max(initial=0) > 1 else 1
    return np.clip(np.nan_to_num(images.astype(np.float64) / full), 0, 1)


def _write(
    sheet: UInt8[np.ndarray, "height width 3"],
    texts: Sequence[tuple[float, float, str, str]],
    path: str | os.PathLike[str],
) -> None:
    """Writes a sheet dot for dot, and texts at places in dots right of and below its corner."""
    height, width, _ = sheet.shape
    left, right, top, bottom = 0.0, width, 0.0, height
    for x, y, text, side in texts:
        if text:
            start = x - {"right": 1, "center": 0.5}[side] * _length(text)
            left, right = min(left, start), max(right, start + _length(text))
            top, bottom = min(top, y - 12), max(bottom, y + 12)
    left, right, top, bottom = (
        round(edge) for edge in (left - 12, right + 12, top - 12, bottom + 12)
    )
    across, down = right - left, bottom - top
    figure = _figure(across / _DPI, down / _DPI)
    figure.figimage(sheet, -left, bottom - height, origin="upper")
    for x, y, text, side in texts:
        place = (x - left) / across, (bottom - y) / down
        figure.text(*place, text, ha=side, va="center", size=10)
    figure.savefig(os.fspath(path))


def _length(text: str) -> float:
    """The length in dots of a text of ten points."""
    return _figure(1.0, 1.0).text(0, 0, text, size=10).get_window_extent().width


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI)
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
