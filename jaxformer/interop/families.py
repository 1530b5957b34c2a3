"""The architectures that are known, by the `model_type` of `config.json`."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

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
}


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
        example: Arguments of `model.init`, as shapes and dtypes.
        prefix: What the names of tensors start with that a checkpoint of the bare model lacks.
        tied: Tensors that a checkpoint may have though they are tied to another one: name of the
            one and of the other.
        unused: Patterns of tensors that say nothing of what the model computes.
        method: The method of the model that makes all parameters of a config.
        renamed: Patterns of names in some checkpoints, and what stands for them in the rules.
        amend: Makes the config of what `read` made and the files, where these say what the settings
            do not; may refuse files.
    """

    model_type: str
    architecture: str
    model: Callable[[Any], nn.Module]
    read: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    example: tuple[tuple[int, ...], ...] = ((1, 1),)
    prefix: str = "model."
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    unused: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    method: Callable[[Any], str] = lambda config: "__call__"
    renamed: tuple[tuple[str, str], ...] = ()
    amend: Callable[[Any, Tensors], Any] = lambda config, files: config


def family(model_type: str, where: str) -> Family:
    """Finds an architecture.

    Raises:
        ValueError: If it is not known.
    """
    if model_type not in MODULES:
        raise ValueError(f"{where}: model_type={model_type!r} is not known; {[*MODULES]} are.")
    module = importlib.import_module(f"jaxformer.interop.{MODULES[model_type]}")
    return module.FAMILIES[model_type]
