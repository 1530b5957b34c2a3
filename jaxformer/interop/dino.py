"""DINOv2, with registers or without, and DINOv3: learned scales of branches, gated MLPs."""

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxformer.interop import vit
from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, beside, reshaped
from jaxformer.interop.settings import Settings
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops.rope import GridRope

# Of training, and of what reads features of several layers.
_IDLE = (
    "apply_layernorm",
    "drop_path_rate",
    "out_features",
    "out_indices",
    "pos_embed_jitter",
    "pos_embed_rescale",
    "pos_embed_shift",
    "reshape_hidden_states",
    "stage_names",
)
_DINOV2 = vit.Names(
    "encoder.layer.{}.",
    vit.ATTENTION | {"mlp/inner/up": "mlp.fc1", "mlp/inner/down": "mlp.fc2"},
    {"attention/norm": "norm1", "mlp/norm": "norm2"},
    {"attention/scale": "layer_scale1.lambda1", "mlp/scale": "layer_scale2.lambda1"},
)
_DINOV3 = dataclasses.replace(
    _DINOV2,
    layer="layer.{}.",
    maps={
        "attention/inner/qkv": tuple(f"attention.{x}_proj" for x in "qkv"),
        "attention/inner/out": "attention.o_proj",
        "mlp/inner/up": "mlp.up_proj",
        "mlp/inner/down": "mlp.down_proj",
    },
    embed="embeddings.patch_embeddings",
    norm="norm",
)
_GATED2 = dataclasses.replace(
    _DINOV2,
    maps=vit.ATTENTION | {"mlp/inner/up": "mlp.weights_in", "mlp/inner/down": "mlp.weights_out"},
)
_GATED3 = dataclasses.replace(
    _DINOV3, maps={**_DINOV3.maps, "mlp/inner/up": ("mlp.gate_proj", "mlp.up_proj")}
)
_CLASSES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


def _common(s: Settings, **defaults: Any) -> dict[str, Any]:
    found = vit.sizes(s, **defaults) | {"layer_scale": float(s.take("layerscale_value", 1.0))}
    for name in _IDLE:
        s.take(name, None)
    return found


def _read(model_type: str, s: Settings) -> ViTConfig:
    registers = model_type == "dinov2_with_registers"
    found = _common(s, epsilon=1e-6, patch=16 if registers else 14)
    number, ratio = vit.head(s, _CLASSES[model_type]), float(s.take("mlp_ratio", 4))
    found |= {"num_classes": number or 0, "pool": "token" if number is None else "both"}
    found["qkv_bias"] = s.take("qkv_bias", True)
    if gated := s.take("use_swiglu_ffn", False):
        found |= {"gated": True, "activation": "silu"}
    found["hidden"] = _hidden(found["width"], ratio, gated)
    if registers:
        found |= {"registers": s.take("num_register_tokens", 4), "antialias": True}
    found["mask_token"] = registers or s.take("use_mask_token", True)
    return ViTConfig(**found)


def _hidden(width: int, ratio: float, gated: bool) -> int:
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _write(model_type: str, config: ViTConfig) -> dict[str, Any]:
    bare = config.pool == "token" and not config.num_classes
    found = vit.written_head(_CLASSES[model_type], None if bare else config.num_classes)
    found |= vit.written_sizes(config) | {"layerscale_value": config.layer_scale}
    ratios = (
        x for x in range(1, 65) if _hidden(config.width, float(x), config.gated) == config.hidden
    )
    found |= {"mlp_ratio": next(ratios, None), "use_swiglu_ffn": config.gated}
    if model_type == "dinov2":
        found["use_mask_token"] = config.mask_token
    else:
        found["num_register_tokens"] = config.registers
    return found | {"qkv_bias": config.qkv_bias}


def _rules(model_type: str, config: ViTConfig) -> list[Rule]:
    found = vit.rules(_GATED2 if config.gated else _DINOV2, config, theirs=f"{model_type}.")
    if config.mask_token:
        name, width = f"{model_type}.embeddings.mask_token", config.width
        found.append(reshaped("mask_token", name, (1, width), (width,)))
    return _without_registers(config, found) if model_type != "dinov2" else found


def _without_registers(config: ViTConfig, rules: list[Rule]) -> list[Rule]:
    """Where there are none, there is still a tensor of them."""
    first = next(i for i, rule in enumerate(rules) if rule.ours == "class_token")
    if not config.registers:
        name = rules[first].theirs[0].replace("cls_token", "register_tokens")
        rules[first] = beside(rules[first], name, np.zeros((1, 0, config.width)))
    return rules


def _read3(s: Settings) -> ViTConfig:
    found = _common(s, epsilon=1e-5)
    vit.architecture(s, "DINOv3ViTModel")
    found |= {"hidden": s.take("intermediate_size"), "gated": s.take("use_gated_mlp", False)}
    found["registers"] = s.take("num_register_tokens", 0)
    found["qkv_bias"] = biased = s.take("query_bias", True)
    s.only("value_bias", biased)
    # Where queries have no bias, keys have none either, and it is not said.
    keys = s.take("key_bias", False)
    if keys and not biased:
        raise ValueError(f"{s.where}: key_bias={keys} is not supported without query_bias.")
    found["key_bias"] = keys or not biased
    for name in ("proj_bias", "mlp_bias"):
        s.only(name, True)
    rope = GridRope(float(s.take("rope_theta", 100.0)))
    return ViTConfig(positions="rotary", rope=rope, mask_token=True, **found)


def _write3(config: ViTConfig) -> dict[str, Any]:
    found = vit.written_sizes(config) | {"layerscale_value": config.layer_scale}
    return found | {
        "architectures": ["DINOv3ViTModel"],
        "intermediate_size": config.hidden,
        "use_gated_mlp": config.gated,
        "num_register_tokens": config.registers,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "rope_theta": config.rope.theta,
    }


def _rules3(config: ViTConfig) -> list[Rule]:
    found, width = vit.rules(_GATED3 if config.gated else _DINOV3, config), (config.width,)
    found.append(reshaped("mask_token", "embeddings.mask_token", (1, 1, *width), width))
    return _without_registers(config, found)


FAMILIES = {
    name: Family(
        name,
        f"{_CLASSES[name]}Model",
        ViT,
        functools.partial(_read, name),
        functools.partial(_write, name),
        functools.partial(_rules, name),
        example=vit.images,
        prefix=f"{name}.",
        tied=(),
        unused=(),
        method=vit.method,
        renamed=vit.MODULES[:4],
    )
    for name in _CLASSES
} | {
    "dinov3_vit": Family(
        "dinov3_vit",
        "DINOv3ViTModel",
        ViT,
        _read3,
        _write3,
        _rules3,
        example=vit.images,
        prefix="",
        tied=(),
        unused=(),
        renamed=((r"^model\.layer\.", "layer."),),
    )
}
