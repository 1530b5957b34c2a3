"""What class tokens learned without labels are worth, and pictures, for `experiments/dino.py`."""

from typing import Any

from experiments import dino_views, vision
from jaxformer.analysis import representation
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.training import images, pictures, records, run
from jaxformer.typing import PyTree


def write(
    record: run.Run,
    settings: dict[str, Any],
    encoder: ViTConfig,
    sides: tuple[PyTree, PyTree],
    seen: images.Images,
    views: dino_views.Views,
) -> None:
    """Writes `report.json` and pictures into the folder of a run, and prints the report.

    Args:
        record: The open run.
        settings: The first rows of the report.
        encoder: Of the model.
        sides: Its parameters after training, and before.
        seen: The images.
        views: The crops.
    """
    figures, both = dict(settings), vision.features(encoder, sides, seen)
    for name, (bank, queries) in both.items():
        rank = representation.effective_rank(queries)
        found = {
            "rank": rank,
            "rank of width %": 100 * rank / queries.shape[1],
            "rank about the mean": representation.effective_rank(queries - queries.mean(axis=0)),
            **vision.judge(seen, bank, queries),
        }
        figures |= {name + key: value for key, value in found.items()}
    figures |= vision.judge_pixels(seen)
    record.report(figures)

    folder, few = record.folder, seen.test_images[:10]
    pictures.loss_curve(
        records.read_metrics(folder / "metrics.jsonl"), folder / "loss.png", unit="loss"
    )
    vision.draw_neighbours(seen, *both[""], folder / "neighbours.png")
    teacher = {"params": sides[0]["params"]["encoder"]}
    vision.draw_attention(ViT(encoder), teacher, few, folder / "attention.png")
    dino_views.draw(views, few[:6], encoder.patch, folder / "crops.png")
    print(records.table(figures))
