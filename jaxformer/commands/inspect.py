"""The command `jaxformer inspect`."""

import dataclasses
import json as json_format
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jaxformer.interop import checkpoint
from jaxformer.interop.families import family
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors
from jaxformer.models.decoder import Decoder
from jaxformer.tokenizers import formats

Folder = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def run(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        ValueError: If the checkpoint is unusable.
        OSError: If a file cannot be read.
        SystemExit: If the arguments are none, with code 2, or ask for help.
    """
    tyro.cli(
        inspect,
        prog="jaxformer inspect",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def inspect(folder: Folder, *, context: int | None = None, json: bool = False) -> None:
    """Says what a Hugging Face folder holds, without reading the weights.

    Args:
        folder: With config.json and safetensors.
        context: Tokens for which the cache is counted; the model's bound, or 4,096, if not given.
        json: One line of JSON in place of the lines.
    """
    found = report(folder, context)
    if json:
        print(json_format.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(name)
            for key, x in value.items():
                print(f"  {key:24} {_shown(x)}")
        else:
            print(f"{name:26} {_shown(value)}")


def report(folder: pathlib.Path, context: int | None = None) -> dict[str, Any]:
    """What `inspect` prints."""
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    settings = Settings.read(folder)
    kind = family(settings.take("model_type"), settings.where)
    config = kind.read(settings)
    settings.finish()
    files = Tensors(folder)
    config = kind.amend(config, files)
    model = kind.model(config)
    shapes = checkpoint.parameter_shapes(kind, model)
    checkpoint.match(kind, list(kind.rules(config)), files)
    parts: dict[str, int] = {}
    for path, shape in shapes.items():
        words = path.split("/")
        part = next((x for x in words if x in ("attention", "cross", "mlp")), words[0])
        parts[part] = parts.get(part, 0) + math.prod(shape.shape)
    total = sum(parts.values())
    found: dict[str, Any] = {
        "architecture": kind.architecture,
        "files": len({files.place(name) for name in files.names()}),
        "config": _changed(config),
        "parameters": parts | {"total": total},
        "bytes of parameters": {name: total * size for name, size in _BYTES.items()},
    }
    if isinstance(model, Decoder):
        length = config.max_length or 4096 if context is None else context
        if length < 1:
            raise ValueError(f"--context must be positive, got {length}.")
        cache = jax.eval_shape(lambda: model.empty_cache(1, length, "bfloat16"))
        bytes_of = sum(
            math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(cache)
        )
        found["generation"] = {
            "context": length,
            "cache of a text, bfloat16": bytes_of,
            "with bfloat16 parameters": bytes_of + total * 2,
        }
    if not hasattr(config, "vocab_size"):
        return found
    try:
        words = formats.load(folder)
        found["tokenizer"] = f"{type(words).__name__}, {words.vocab_size} tokens"
    except (OSError, ValueError) as error:
        found["tokenizer"] = f"none: {error}"
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return f"{value:,}"


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their defaults; those of parts by "part.field"."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING and dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": x for name, x in _changed(value).items()}
        elif value != field.default:
            found[field.name] = value
    return found
