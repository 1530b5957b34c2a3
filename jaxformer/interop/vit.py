"""ViT and I-JEPA, and what all vision Transformers say and store alike."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import (
    Rule,
    affine,
    convolution,
    joined,
    norm,
    reshaped,
    same,
    turned,
)
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors
from jaxformer.models.transformer import TransformerConfig
from jaxformer.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class Names:
    """What a vision Transformer calls its tensors.

    Attributes:
        layer: Of a layer, with a place for its number.
        maps: Our maps of a layer, by theirs: one name, or those of several side by side.
        norms: Our norms of a layer, by theirs.
        scales: Our learned scales of branches, by theirs.
        embed: The convolution that embeds patches.
        norm: The last norm.
        head: The map to logits.
    """

    layer: str
    maps: Mapping[str, str | tuple[str, ...]]
    norms: Mapping[str, str]
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    embed: str = "embeddings.patch_embeddings.projection"
    norm: str = "layernorm"
    head: str = "classifier"


ATTENTION = {
    "attention/inner/qkv": tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
    "attention/inner/out": "attention.output.dense",
}
NAMES = Names(
    "encoder.layer.{}.",
    ATTENTION | {"mlp/inner/up": "intermediate.dense", "mlp/inner/down": "output.dense"},
    {"attention/norm": "layernorm_before", "mlp/norm": "layernorm_after"},
)
# The modules of transformers 5, by what it and all before it write.
MODULES = (
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"(^|\.)layers\.", r"\1encoder.layer."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)
_CLASSES = {"vit": "ViT", "ijepa": "IJepa"}


def images(config: ViTConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a model is initialised with that reads images."""
    return (jax.ShapeDtypeStruct((1, *config.size, config.channels), jnp.float32),)


def method(config: ViTConfig) -> str:
    """What makes all parameters when it is initialised."""
    return "logits" if config.num_classes else "pooled" if config.pooler else "__call__"


def architecture(s: Settings, *known: str) -> str:
    """Takes the class of a checkpoint; the first is the default.

    Raises:
        ValueError: If it is not known.
    """
    found = s.take("architectures", [known[0]])
    if len(found) != 1 or found[0] not in known:
        raise ValueError(f"{s.where}: architectures={found} is not supported; {known} are.")
    return found[0]


def head(s: Settings, name: str) -> int | None:
    """Takes how many classes a model scores; None for the class of the bare model."""
    kind = architecture(s, f"{name}Model", f"{name}ForImageClassification")
    names, number = s.take("id2label", None), s.take("num_labels", 2)
    if kind == f"{name}Model":
        return None
    return number if names is None else len(names)


def written_head(name: str, classes: int | None) -> dict[str, Any]:
    """The way back."""
    if classes is None:
        return {"architectures": [f"{name}Model"]}
    labels = {str(i): f"LABEL_{i}" for i in range(classes)}
    numbers = {label: int(i) for i, label in labels.items()}
    kind = [f"{name}ForImageClassification"]
    return {"architectures": kind, "id2label": labels, "label2id": numbers}


def sizes(s: Settings, *, epsilon: float, patch: int = 16) -> dict[str, Any]:
    """What all models of images say alike."""

    def pair(name: str, default: int) -> tuple[int, int]:
        value = s.take(name, default)
        rows, columns = (value, value) if isinstance(value, int) else value
        return rows, columns

    return {
        "size": pair("image_size", 224),
        "patch": pair("patch_size", patch),
        "channels": s.take("num_channels", 3),
        "width": s.take("hidden_size"),
        "num_layers": s.take("num_hidden_layers"),
        "num_heads": s.take("num_attention_heads"),
        "activation": s.choice("hidden_act", ACTIVATIONS, "gelu"),
        "epsilon": s.take("layer_norm_eps", epsilon),
    }


def written_sizes(config: ViTConfig) -> dict[str, Any]:
    """The way back."""

    def pair(value: tuple[int, ...]) -> int | list[int]:
        rows, columns = value
        return rows if rows == columns else [rows, columns]

    return {
        "image_size": pair(config.size),
        "patch_size": pair(config.patch),
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": WRITTEN[config.activation],
        "layer_norm_eps": config.epsilon,
    }


def rules(names: Names, config: ViTConfig, ours: str = "", theirs: str = "") -> list[Rule]:
    """The tensors of a model of images or clips.

    Args:
        names: What they are called.
        config: The model's.
        ours: What our paths start with.
        theirs: What their names start with, but that of the head.
    """
    width, tokens = (config.width,), f"{theirs}embeddings."
    embed = theirs + names.embed
    found = [
        convolution(f"{ours}embed/kernel", f"{embed}.weight", config.patch, config.channels),
        same(f"{ours}embed/bias", f"{embed}.bias"),
    ]
    if config.class_token:
        found.append(reshaped(f"{ours}class_token", f"{tokens}cls_token", (1, 1, *width), width))
    if config.registers:
        rows = (config.registers, *width)
        found.append(reshaped(f"{ours}registers", f"{tokens}register_tokens", (1, *rows), rows))
    if config.positions == "learned":
        rows = (config.placed_class + math.prod(config.grid), *width)
        name = f"{tokens}position_embeddings"
        found.append(reshaped(f"{ours}places/table", name, (1, *rows), rows))
    found += blocks(names, config.trunk(), ours, theirs)
    found += norm(f"{ours}norm", theirs + names.norm)
    if config.pooler:
        found += affine(f"{ours}pool", f"{theirs}pooler.dense")
    if config.num_classes:
        found += affine(f"{ours}head", names.head)
    return found


def blocks(names: Names, config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    """The tensors of the blocks alone."""
    parts = {"attention/inner/qkv": [config.width] * 3, "mlp/inner/up": [config.hidden] * 2}
    found = []
    for i in range(config.num_layers):
        here, there = f"{ours}blocks/layers_{i}/", theirs + names.layer.format(i)
        for a, b in names.maps.items():
            weights, biases = (
                [f"{there}{x}.{kind}" for x in ((b,) if isinstance(b, str) else b)]
                for kind in ("weight", "bias")
            )
            if len(weights) == 1:
                found.append(turned(f"{here}{a}/kernel", weights[0]))
                found.append(same(f"{here}{a}/bias", biases[0]))
                continue
            found.append(joined(f"{here}{a}/kernel", weights, parts[a]))
            if a == "mlp/inner/up" or (config.qkv_bias and config.key_bias):
                found.append(joined(f"{here}{a}/bias", biases, parts[a]))
            elif config.qkv_bias:
                found.append(same(f"{here}attention/inner/q_bias", biases[0]))
                found.append(same(f"{here}attention/inner/v_bias", biases[2]))
        for a, b in names.norms.items():
            found += norm(here + a, there + b)
        found += [same(here + a, there + b) for a, b in names.scales.items()]
    return found


def _read(model_type: str, s: Settings) -> ViTConfig:
    found, number = sizes(s, epsilon=1e-12), head(s, _CLASSES[model_type])
    found |= {"hidden": s.take("intermediate_size"), "qkv_bias": s.take("qkv_bias", True)}
    found["num_classes"] = number or 0
    if model_type == "ijepa":
        found |= {"class_token": False, "pool": "mean"}
    else:
        found["pooler"] = number is None
    s.only("pooler_output_size", found["width"])
    s.only("pooler_act", "tanh")
    for name in ("encoder_stride", "mlp_ratio"):  # of another head, and what none reads
        s.take(name, None)
    return ViTConfig(**found)


def _write(model_type: str, config: ViTConfig) -> dict[str, Any]:
    # A ViT without a pooler is a classifier of no classes, whose logits are the features.
    bare = not config.num_classes if model_type == "ijepa" else config.pooler
    found = written_head(_CLASSES[model_type], None if bare else config.num_classes)
    found |= {"intermediate_size": config.hidden, "qkv_bias": config.qkv_bias}
    return found | written_sizes(config)


def _amend(config: ViTConfig, files: Tensors) -> ViTConfig:
    """A bare model has a pooler or not."""
    there = any(name.endswith("pooler.dense.weight") for name in files.names())
    return dataclasses.replace(config, pooler=config.pooler and there)


FAMILIES = {
    name: Family(
        name,
        f"{_CLASSES[name]}ForImageClassification",
        ViT,
        functools.partial(_read, name),
        functools.partial(_write, name),
        functools.partial(rules, NAMES, theirs=f"{name}."),
        example=images,
        prefix=f"{name}.",
        tied=(),
        unused=(rf"{name}\.pooler\..*",),  # beside a head
        method=method,
        renamed=MODULES,
        amend=_amend,
    )
    for name in _CLASSES
}
