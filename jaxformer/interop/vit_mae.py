"""ViTMAE: a masked autoencoder, or its encoder alone; tables of positions are always stored.

Such as are the sinusoids, as those of all published checkpoints, are none of our parameters.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.interop import vit
from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, affine, alike, beside, norm, reshaped
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors
from jaxformer.layers.embed import GridPositions
from jaxformer.models.mae import MAE, MAEConfig
from jaxformer.models.predictor import PredictorConfig
from jaxformer.models.vit import ViT, ViTConfig

_DECODER = dataclasses.replace(vit.NAMES, layer="decoder.decoder_layers.{}.")
_ENCODER_TABLE, _DECODER_TABLE = "embeddings.position_embeddings", "decoder.decoder_pos_embed"


def _model(config: Any) -> nn.Module:
    return MAE(config) if isinstance(config, MAEConfig) else ViT(config)


def _example(config: MAEConfig | ViTConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    if isinstance(config, ViTConfig):
        return vit.images(config)
    numbers = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return (*vit.images(config.encoder), numbers, numbers)


def _read(s: Settings) -> MAEConfig | ViTConfig:
    kind = vit.architecture(s, "ViTMAEForPreTraining", "ViTMAEModel")
    found = vit.sizes(s, epsilon=1e-12)
    for name in ("size", "patch"):
        if len({*found[name]}) > 1:
            raise ValueError(f"{s.where}: a ViTMAE is of squares alone, got {found[name]}.")
    found |= {"hidden": s.take("intermediate_size"), "qkv_bias": s.take("qkv_bias", True)}
    encoder = ViTConfig(positions="sinusoidal", **found)
    defaults = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16}
    defaults["intermediate_size"] = 2048
    sizes = [s.take(f"decoder_{name}", default) for name, default in defaults.items()]
    for name in ("mask_ratio", "norm_pix_loss"):  # of training
        s.take(name, None)
    if kind == "ViTMAEModel":
        return encoder
    pixels = found["patch"][0] * found["patch"][1] * found["channels"]
    return MAEConfig(encoder, PredictorConfig(*sizes, outputs=pixels))


def _write(config: MAEConfig | ViTConfig) -> dict[str, Any]:
    encoder = config.encoder if isinstance(config, MAEConfig) else config
    found = vit.written_sizes(encoder)
    found |= {"intermediate_size": encoder.hidden, "qkv_bias": encoder.qkv_bias}
    if isinstance(config, ViTConfig):
        return found | {"architectures": ["ViTMAEModel"]}
    return found | {
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": config.decoder.width,
        "decoder_num_hidden_layers": config.decoder.num_layers,
        "decoder_num_attention_heads": config.decoder.num_heads,
        "decoder_intermediate_size": config.decoder.hidden,
    }


def _positioned(config: Any, encoder: str, decoder: str) -> MAEConfig | ViTConfig:
    """The config with other positions of both parts."""
    if isinstance(config, ViTConfig):
        return dataclasses.replace(config, positions=encoder)
    return MAEConfig(
        dataclasses.replace(config.encoder, positions=encoder),
        dataclasses.replace(config.decoder, positions=decoder),
    )


def _told(config: MAEConfig | ViTConfig) -> MAEConfig | ViTConfig:
    """Says nothing of whether tables are the sinusoids."""
    parts = [config] if isinstance(config, ViTConfig) else [config.encoder, config.decoder]
    tables = all(part.positions in ("learned", "sinusoidal") for part in parts)
    return _positioned(config, "sinusoidal", "sinusoidal") if tables else config


def _amend(config: MAEConfig | ViTConfig, files: Tensors) -> MAEConfig | ViTConfig:
    """Tables that are not the sinusoids are parameters."""
    encoder = config.encoder if isinstance(config, MAEConfig) else config

    def positions(end: str, width: int) -> str:
        found = [files.read(name) for name in sorted(files.names()) if name.endswith(end)]
        waves = sinusoids(encoder.grid, width)
        return "sinusoidal" if all(alike(x, waves) for x in found) else "learned"

    decoder = config.decoder.width if isinstance(config, MAEConfig) else encoder.width
    return _positioned(
        config, positions(_ENCODER_TABLE, encoder.width), positions(_DECODER_TABLE, decoder)
    )


def sinusoids(grid: tuple[int, ...], width: int) -> np.ndarray:
    """The table of a class token and patches as it is stored."""
    return np.asarray(GridPositions(grid, width, learned=False, before=1).apply({}, grid))[None]


def _rules(config: MAEConfig | ViTConfig) -> list[Rule]:
    if isinstance(config, ViTConfig):
        return _encoder(config, "")
    encoder, decoder = config.encoder, config.decoder
    width = decoder.width
    table = sinusoids(encoder.grid, width)
    mask = reshaped("decoder/mask_tokens", "decoder.mask_token", (1, 1, width), (1, width))
    if decoder.positions == "learned":
        there, here = table.shape, table.shape[1:]
        tables = [mask, reshaped("decoder/places/table", _DECODER_TABLE, there, here)]
    else:
        tables = [beside(mask, _DECODER_TABLE, table)]
    return [
        *_encoder(encoder, "encoder/"),
        *tables,
        *affine("decoder/embed", "decoder.decoder_embed"),
        *vit.blocks(_DECODER, decoder.trunk(encoder), "decoder/", ""),
        *norm("decoder/norm", "decoder.decoder_norm"),
        *affine("decoder/head", "decoder.decoder_pred"),
    ]


def _encoder(config: ViTConfig, ours: str) -> list[Rule]:
    found = vit.rules(vit.NAMES, config, ours, "vit.")
    if config.positions == "learned":
        return found
    table = sinusoids(config.grid, config.width)
    token = f"{ours}class_token"
    return [beside(x, f"vit.{_ENCODER_TABLE}", table) if x.ours == token else x for x in found]


FAMILIES = {
    "vit_mae": Family(
        "vit_mae",
        "ViTMAEForPreTraining",
        _model,
        _read,
        _write,
        _rules,
        example=_example,
        prefix="vit.",
        tied=(),
        unused=(),
        renamed=(*vit.MODULES, (r"decoder_encoder\.layer\.", "decoder_layers.")),
        amend=_amend,
        told=_told,
    )
}
