"""The encoder that a run has trained, as two files in its folder, and back.

    model, variables = trained.load("runs/dino")
    vectors = model.apply(variables, images)

Images are those of `vision.centred(vision.light(bytes))`.
"""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import numpy as safetensors

from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops.rope import GridRope
from jaxformer.training import records
from jaxformer.typing import PyTree

_CONFIG, _TENSORS = "encoder.json", "encoder.safetensors"


def save(folder: str | os.PathLike[str], config: ViTConfig, params: PyTree) -> None:
    """Writes `encoder.json` and `encoder.safetensors`, whose names are paths of parameters."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    tensors = {name: np.ascontiguousarray(x) for name, x in flat.items()}
    safetensors.save_file(tensors, pathlib.Path(folder, _TENSORS))
    records.write_json(pathlib.Path(folder, _CONFIG), config)


def load(folder: str | os.PathLike[str]) -> tuple[ViT, PyTree]:
    """Reads what a run has saved: a module and its variables.

    Raises:
        FileNotFoundError: If the folder holds no such files.
    """
    path = pathlib.Path(folder, _CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run writes it when it is finished.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = GridRope(**settings.pop("rope"))
    sizes: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()
    }
    flat = safetensors.load_file(pathlib.Path(folder, _TENSORS))
    params = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, flat), sep="/")
    return ViT(ViTConfig(**sizes, rope=rope)), {"params": params}
