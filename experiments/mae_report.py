"""What a masked autoencoder has learned, and pictures: the second half of `experiments/mae.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import vision
from jaxformer.models.mae import MAE
from jaxformer.ops import patch_masks, patches
from jaxformer.training import images, pictures, records, run
from jaxformer.typing import Array, Float, PyTree


def write(
    record: run.Run,
    settings: dict[str, Any],
    model: MAE,
    sides: tuple[PyTree, PyTree],
    seen: images.Images,
    split: patch_masks.Split,
) -> None:
    """Writes `report.json` and pictures into the folder of a run, and prints the report.

    Args:
        record: The open run.
        settings: The first rows of the report.
        model: What was trained.
        sides: Its parameters after training, and before.
        seen: The images.
        split: Which patches to hide of the first test images, for the pictures.
    """
    figures, encoder, count = dict(settings), model.config.encoder, split.mask.shape[1]
    for name, features in vision.features(encoder, sides, seen).items():
        figures |= {name + key: value for key, value in vision.judge(seen, *features).items()}
    figures |= vision.judge_pixels(seen)
    shown = split.shown.shape[1]
    part, whole = (operations(model, sides[0], n) for n in (shown, count))
    figures |= {"shown patches": f"{shown} of {count}", "operations to encode these": part}
    figures["of those of all patches %"] = 100 * part / whole
    record.report(figures)

    rows = records.read_metrics(record.folder / "metrics.jsonl")
    path, unit = record.folder / "loss.png", "error, of variance 1"
    pictures.loss_curve(rows, path, evaluations=("test_loss",), unit=unit)
    few = seen.test_images[: len(split.mask)]
    grey = pictures.hide(few / 255, np.asarray(split.mask), (encoder.patch[0], encoder.patch[1]))
    filled = np.asarray(fill(model, sides[0], jnp.asarray(few), split))
    labels, title = ("image", "shown", "filled"), "Filled with each patch's mean and deviation"
    grid = np.stack([few / 255, grey, filled])
    pictures.image_grid(grid, record.folder / "filled.png", labels, (), title)
    print(records.table(figures))


def operations(model: MAE, params: PyTree, shown: int) -> float:
    """Counts, as XLA does, the operations of encoding so many patches of an image."""
    encoder = model.config.encoder
    image = jax.ShapeDtypeStruct((1, *encoder.size, encoder.channels), jnp.float32)
    keep = jnp.arange(shown)[None]
    encode = jax.jit(lambda params, x: model.apply(params, x, keep=keep, method="encode"))
    cost: Any = encode.lower(params, image).compile().cost_analysis()
    return cost["flops"]


def fill(
    model: MAE, params: PyTree, pixels: Array, split: patch_masks.Split
) -> Float[Array, "B height width C"]:
    """Paints the hidden patches; each is given the mean and the deviation that it truly has."""
    patch, x = model.config.encoder.patch, vision.light(pixels)
    true = patches.patchify(x, patch)
    told: Any = model.apply(params, vision.centred(x), split.shown, split.hidden)
    told = told * true.std(-1, ddof=1, keepdims=True) + true.mean(-1, keepdims=True)
    filled = jnp.where(split.mask[..., None], told, true)
    return patches.unpatchify(filled, patch, x.shape[1:3])
