"""What a JEPA's vectors are worth, and pictures: the second half of `experiments/ijepa.py`."""

import math
import os
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import ijepa_loss, vision
from jaxformer.analysis import representation
from jaxformer.models.vit import ViTConfig
from jaxformer.training import images, pictures, records, run
from jaxformer.typing import PyTree, UInt8


def write(
    record: run.Run,
    settings: dict[str, Any],
    encoder: ViTConfig,
    sides: tuple[PyTree, PyTree],
    seen: images.Images,
) -> None:
    """Writes `report.json` and pictures into the folder of a run, and prints the report.

    Args:
        record: The open run.
        settings: The first rows of the report.
        encoder: Of the model.
        sides: Its parameters after training, and before.
        seen: The images.
    """
    figures, both = dict(settings), vision.features(encoder, sides, seen)
    for name, (bank, queries) in both.items():
        found = {
            "rank": representation.effective_rank(queries),
            "rank about the mean": representation.effective_rank(queries - queries.mean(axis=0)),
            **vision.judge(seen, bank, queries),
        }
        figures |= {name + key: value for key, value in found.items()}
    figures |= {"width": encoder.width, "rank of width %": 100 * figures["rank"] / encoder.width}
    figures |= vision.judge_pixels(seen)
    record.report(figures)
    draw_course(records.read_metrics(record.folder / "metrics.jsonl"), record.folder / "loss.png")
    vision.draw_neighbours(seen, *both[""], record.folder / "neighbours.png")
    draw_blocks(seen.test_images[:6], encoder, record.folder / "blocks.png")
    print(records.table(figures))


def draw_course(rows: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the loss over the steps, and below it the rank."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, name, style in ((above, "loss", "-"), (below, "rank", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), style, color="tab:blue", markersize=4)
        axes.set(ylabel={"loss": "loss", "rank": "effective rank"}[name], ylim=(0, None))
        axes.grid(alpha=0.25)
    below.set_xlabel("steps")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)


def draw_blocks(
    pixels: UInt8[np.ndarray, "images height width C"],
    encoder: ViTConfig,
    path: str | os.PathLike[str],
) -> None:
    """Draws images, what is shown of each, and the blocks of it that are to be predicted."""
    drawn = ijepa_loss.hide(encoder.grid)({"images": pixels}, np.random.default_rng(0))
    columns = [pixels]
    for indices in (drawn["shown"], *drawn["targets"].swapaxes(0, 1)):
        hidden = (indices[:, :, None] != np.arange(math.prod(encoder.grid))).all(axis=1)
        columns.append(pictures.hide(pixels, hidden, (encoder.patch[0], encoder.patch[1])))
    labels = ("image", "shown", *(f"block {n + 1}" for n in range(len(columns) - 2)))
    pictures.image_grid(np.stack(columns, axis=1), path, (), labels, "What is shown and predicted")
