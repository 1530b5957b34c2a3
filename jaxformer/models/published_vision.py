"""Configs of models of images and clips that were published, by name.

    ViT(published_vision.ENCODERS["dinov2_b14"])
    MAE(published_vision.AUTOENCODERS["mae_b16"])
    JEPA(published_vision.PREDICTIVE["v_jepa_2_l16"])

All say what the published `config.json` says.
"""

from typing import Any

from jaxformer.models.jepa import JEPAConfig
from jaxformer.models.mae import MAEConfig
from jaxformer.models.vit import ViTConfig


def vit(name: str) -> ViTConfig:
    """ViT, as trained for the thousand classes of ImageNet.

    References:
        Dosovitskiy et al. 2021, table 1. https://arxiv.org/abs/2010.11929
    """
    return ViTConfig.of_size(name, epsilon=1e-12, num_classes=1000)


def i_jepa(name: str, size: int = 224) -> ViTConfig:
    """The encoder of I-JEPA.

    References:
        Assran et al. 2023. https://arxiv.org/abs/2301.08243
    """
    return ViTConfig.of_size(name, size, class_token=False, pool="mean")


def dinov2(width: int, num_layers: int, num_heads: int, *, registers: int = 0) -> ViTConfig:
    """DINOv2, whose positions are those of images of 518×518; the largest has a gated MLP.

    References:
        Oquab et al. 2024. https://arxiv.org/abs/2304.07193
        Darcet et al. 2024 (registers). https://arxiv.org/abs/2309.16588
    """
    sizes = ((518, 518), (14, 14), 3, width, num_layers, num_heads)
    choices: dict[str, Any] = {"registers": registers, "antialias": registers > 0}
    if gated := width == 1536:
        choices |= {"gated": True, "activation": "silu"}
    hidden = 4096 if gated else 4 * width
    return ViTConfig(*sizes, hidden, mask_token=True, layer_scale=1.0, **choices)


def dinov3(
    width: int,
    num_layers: int,
    num_heads: int,
    hidden: int,
    *,
    gated: bool = False,
    qkv_bias: bool = True,
) -> ViTConfig:
    """DINOv3 with rotary positions and four registers.

    References:
        Siméoni et al. 2025. https://arxiv.org/abs/2508.10104
    """
    return ViTConfig(
        (224, 224),
        (16, 16),
        3,
        width,
        num_layers,
        num_heads,
        hidden,
        registers=4,
        mask_token=True,
        positions="rotary",
        activation="silu" if gated else "gelu",
        gated=gated,
        qkv_bias=qkv_bias,
        key_bias=not qkv_bias,  # where there is none it is not said
        epsilon=1e-5,
        layer_scale=1.0,
    )


def mae(name: str) -> MAEConfig:
    """A masked autoencoder; all sizes have the same decoder.

    References:
        He et al. 2022. https://arxiv.org/abs/2111.06377
    """
    encoder = ViTConfig.of_size(name, epsilon=1e-12, positions="sinusoidal")
    return MAEConfig.of(encoder, 512, 8, 16)


ENCODERS = {
    "vit_b16": vit("B/16"),
    "vit_l16": vit("L/16"),
    "i_jepa_h14": i_jepa("H/14"),
    "i_jepa_h16_448": i_jepa("H/16", 448),
    "i_jepa_g16": i_jepa("g/16"),
    "dinov2_s14": dinov2(384, 12, 6),
    "dinov2_b14": dinov2(768, 12, 12),
    "dinov2_l14": dinov2(1024, 24, 16),
    "dinov2_g14": dinov2(1536, 40, 24),
    "dinov2_s14_registers": dinov2(384, 12, 6, registers=4),
    "dinov2_b14_registers": dinov2(768, 12, 12, registers=4),
    "dinov2_l14_registers": dinov2(1024, 24, 16, registers=4),
    "dinov2_g14_registers": dinov2(1536, 40, 24, registers=4),
    "dinov3_s16": dinov3(384, 12, 6, 1536),
    "dinov3_s16_plus": dinov3(384, 12, 6, 1536, gated=True),
    "dinov3_b16": dinov3(768, 12, 12, 3072),
    "dinov3_l16": dinov3(1024, 24, 16, 4096),
    "dinov3_h16_plus": dinov3(1280, 32, 20, 5120, gated=True),
    "dinov3_7b16": dinov3(4096, 40, 32, 8192, gated=True, qkv_bias=False),
}
AUTOENCODERS = {"mae_b16": mae("B/16"), "mae_l16": mae("L/16"), "mae_h14": mae("H/14")}
PREDICTIVE = {
    "v_jepa_2_l16": JEPAConfig.v_jepa_2(1024, 24, 16, 4096),
    "v_jepa_2_h16": JEPAConfig.v_jepa_2(1280, 32, 16, 5120),
    "v_jepa_2_g16": JEPAConfig.v_jepa_2(1408, 40, 22, 6144),
}
