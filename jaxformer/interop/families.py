"""The architectures that are known, by the `model_type` of `config.json`."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.interop.rules import Rule
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors

# Where each is; in the order in which `save` asks who can say what a model's config says.
MODULES = {
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "bloom": "bloom",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "olmo2": "llama",
    "apertus": "llama",
    "mixtral": "experts",
    "gpt_oss": "experts",
    "deepseek_v3": "experts",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "bert": "bert",
    "roberta": "bert",
    "albert": "bert",
    "modernbert": "modernbert",
    "esm": "esm",
    "t5": "t5",
    "bart": "bart",
    "marian": "marian",
    "vit": "vit",
    "ijepa": "vit",
    "vit_mae": "vit_mae",
    "dinov2": "dino",
    "dinov2_with_registers": "dino",
    "dinov3_vit": "dino",
    "vjepa2": "vjepa2",
}


def texts(count: int) -> Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """What a model is initialised with that reads so many texts."""
    return lambda config: (jax.ShapeDtypeStruct((1, 1), jnp.int32),) * count


@dataclasses.dataclass(frozen=True)
class Family:
    """How an architecture is written down.

    Attributes:
        model_type: Its name in `config.json`.
        architecture: The name of its class in transformers.
        model: Makes the model of a config.
        read: Makes the config of settings.
        write: Makes the settings of a config.
        rules: The parameters of a config.
        example: Makes arguments of `model.init` of a config, as shapes and dtypes.
        prefix: What the names of tensors start with that a checkpoint of the bare model lacks.
        tied: Tensors that a checkpoint may have though they are tied to another one: name of the
            one and of the other.
        unused: Patterns of tensors that say nothing of what the model computes.
        method: The method of the model that makes all parameters of a config.
        renamed: Patterns of names in some checkpoints, and what stands for them in the rules.
        amend: Makes the config of what `read` made and the files, where these say what the settings
            do not; may refuse files.
        told: What the settings alone tell of a config, the rest of which `amend` finds in the files
            that are written.
    """

    model_type: str
    architecture: str
    model: Callable[[Any], nn.Module]
    read: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    example: Callable[[Any], Sequence[jax.ShapeDtypeStruct]] = texts(1)
    prefix: str = "model."
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    method: Callable[[Any], str] = lambda config: "__call__"
    renamed: tuple[tuple[str, str], ...] = ()
    amend: Callable[[Any, Tensors], Any] = lambda config, files: config
    told: Callable[[Any], Any] = lambda config: config


def family(model_type: str, where: str) -> Family:
    """Finds an architecture.

    Raises:
        ValueError: If it is not known.
    """
    if model_type not in MODULES:
        raise ValueError(f"{where}: model_type={model_type!r} is not known; {[*MODULES]} are.")
    module = importlib.import_module(f"jaxformer.interop.{MODULES[model_type]}")
    return module.FAMILIES[model_type]
