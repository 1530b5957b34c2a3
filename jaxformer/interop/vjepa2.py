"""V-JEPA 2: an encoder of clips and its predictor."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.interop import vit
from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, affine, norm, reshaped
from jaxformer.interop.settings import Settings
from jaxformer.models.jepa import JEPA, JEPAConfig
from jaxformer.models.predictor import PredictorConfig
from jaxformer.models.vit import ViTConfig
from jaxformer.ops.rope import GridRope

_IDLE = (
    *("drop_path_rate", "num_pooler_layers", "pred_zero_init_mask_tokens"),
    *("image_size", "wide_SiLU"),  # of earlier versions, which read them as little
)
_NAMES = vit.Names(
    "layer.{}.",
    {
        "attention/inner/qkv": tuple(f"attention.{x}" for x in ("query", "key", "value")),
        "attention/inner/out": "attention.proj",
        "mlp/inner/up": "mlp.fc1",
        "mlp/inner/down": "mlp.fc2",
    },
    {"attention/norm": "norm1", "mlp/norm": "norm2"},
    embed="embeddings.patch_embeddings.proj",
)


def _example(config: JEPAConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    numbers = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return (*vit.images(config.encoder), numbers, numbers)


def _read(s: Settings) -> JEPAConfig:
    vit.architecture(s, "VJEPA2Model")
    side, patch, width = s.take("crop_size", 256), s.take("patch_size", 16), s.take("hidden_size")
    encoder = ViTConfig(
        (s.take("frames_per_clip", 64), side, side),
        (s.take("tubelet_size", 2), patch, patch),
        s.take("in_chans", 3),
        width,
        s.take("num_hidden_layers"),
        s.take("num_attention_heads"),
        int(width * s.take("mlp_ratio", 4.0)),
        class_token=False,
        pool="mean",
        positions="rotary",
        rope=GridRope(10_000.0, unit=1.0, interleaved=True),
        activation=s.choice("hidden_act", ACTIVATIONS, "gelu"),
        qkv_bias=s.take("qkv_bias", True),
        epsilon=s.take("layer_norm_eps", 1e-6),
    )
    narrow = s.take("pred_hidden_size", 384)
    predictor = PredictorConfig(
        narrow,
        s.take("pred_num_hidden_layers", 12),
        s.take("pred_num_attention_heads", 12),
        int(narrow * s.take("pred_mlp_ratio", 4.0)),
        outputs=width,
        positions="rotary",
        mask_tokens=s.take("pred_num_mask_tokens", 10),
    )
    s.only("use_SiLU", False)
    for name in _IDLE:
        s.take(name, None)
    return JEPAConfig(encoder, predictor)


def _write(config: JEPAConfig) -> dict[str, Any]:
    encoder, predictor = config.encoder, config.predictor
    (frames, side, _), (tube, patch, _) = encoder.size, encoder.patch
    return {
        "architectures": ["VJEPA2Model"],
        "frames_per_clip": frames,
        "crop_size": side,
        "tubelet_size": tube,
        "patch_size": patch,
        "in_chans": encoder.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": _ratio(encoder.hidden, encoder.width),
        "hidden_act": WRITTEN[encoder.activation],
        "qkv_bias": encoder.qkv_bias,
        "layer_norm_eps": encoder.epsilon,
        "pred_hidden_size": predictor.width,
        "pred_num_hidden_layers": predictor.num_layers,
        "pred_num_attention_heads": predictor.num_heads,
        "pred_mlp_ratio": _ratio(predictor.hidden, predictor.width),
        "pred_num_mask_tokens": predictor.mask_tokens,
    }


def _ratio(hidden: int, width: int) -> float:
    """What times `width` is `hidden` when the fraction is cut off."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _rules(config: JEPAConfig) -> list[Rule]:
    encoder, predictor = config.encoder, config.predictor
    count, width = predictor.mask_tokens, predictor.width
    name = "predictor.embeddings.mask_tokens"
    return [
        *vit.rules(_NAMES, encoder, "encoder/", "encoder."),
        reshaped("predictor/mask_tokens", name, (count, 1, 1, width), (count, width)),
        *affine("predictor/embed", "predictor.embeddings.predictor_embeddings"),
        *vit.blocks(_NAMES, predictor.trunk(encoder), "predictor/", "predictor."),
        *norm("predictor/norm", "predictor.layernorm"),
        *affine("predictor/head", "predictor.proj"),
    ]


FAMILIES = {
    "vjepa2": Family(
        "vjepa2",
        "VJEPA2Model",
        JEPA,
        _read,
        _write,
        _rules,
        example=_example,
        prefix="",
        tied=(),
        unused=(),
    )
}
