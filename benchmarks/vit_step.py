"""A training step of a ViT against transformers on PyTorch, weights, images and AdamW the same.

    python -m benchmarks.vit_step                   needs torch and transformers; a minute

Both losses must fall alike over the first steps before anything is timed; both are timed in turn in
one process, whose allocator keeps its memory as that of the experiments does.
"""

import dataclasses
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer import interop
from jaxformer.models.vit import ViT
from jaxformer.ops import linear, losses
from jaxformer.training import mesh


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time; the defaults are the sizes of `experiments.vit`.

    Attributes:
        side: Height and width of an image in pixels.
        patch: The same of a patch.
        channels: C.
        width: D.
        layers: Blocks.
        heads: N.
        hidden: F.
        batch: Images.
        rounds: Timings of each.
    """

    side: int = 28
    patch: int = 4
    channels: int = 1
    width: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 256
    batch: int = 100
    rounds: int = 9


def main(cfg: Config) -> None:
    """Prints one line of JSON for each."""
    import torch
    import transformers

    mesh.keep_host_memory()  # of both
    torch.set_num_threads(mesh.usable_cores())
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes: dict[str, Any] = {
        "image_size": cfg.side,
        "patch_size": cfg.patch,
        "num_channels": cfg.channels,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.hidden,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 10,
    }
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).train()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        loaded, params = interop.load(folder)
    model: Any = ViT(loaded.config, project=linear.project_input_first)  # pyright: ignore[reportAttributeAccessIssue]
    random = np.random.default_rng(0)
    pixels = random.standard_normal((cfg.batch, cfg.side, cfg.side, cfg.channels), np.float32)
    classes = random.integers(0, 10, cfg.batch)
    images, labels = jnp.asarray(pixels), jnp.asarray(classes)
    given = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2).copy())}
    given["labels"] = torch.tensor(classes)

    def loss_of(params):
        logits = model.apply(params, images, method="logits")
        return losses.cross_entropy(logits, labels).mean()

    sides = (loss_of, params, lambda: theirs(**given).loss, theirs.parameters())
    record.race("vit_step", *sides, rounds=cfg.rounds, count=cfg.batch, unit="images")


if __name__ == "__main__":
    main(tyro.cli(Config))
