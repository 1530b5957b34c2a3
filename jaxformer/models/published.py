"""Configs of models that were published, by name, and of most of their families in any size.

    Decoder(published.DECODERS["llama3_8b"])
    Decoder(published.llama3(512, 6, 8, 2, 1792))

All say what the published `config.json` says, also of how long texts may be.
"""

import dataclasses
import math
from typing import Any

from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig
from jaxformer.ops.rope import Rope, yarn_gain

_AFFINE: dict[str, Any] = {
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def gpt2(width: int, num_layers: int, num_heads: int) -> TransformerConfig:
    """GPT-2.

    References:
        Radford et al. 2019, "Language models are unsupervised multitask learners".
    """
    return TransformerConfig(
        50257,
        width,
        num_layers,
        num_heads,
        num_heads,
        width // num_heads,
        4 * width,
        positions="learned",
        max_length=1024,
        activation="gelu_tanh",
        epsilon=1e-5,
        **_AFFINE,
    )


def llama2(
    width: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden: int
) -> TransformerConfig:
    """Llama 2.

    References:
        Touvron et al. 2023. https://arxiv.org/abs/2307.09288
    """
    return TransformerConfig(
        32000,
        width,
        num_layers,
        num_heads,
        num_kv_heads,
        width // num_heads,
        hidden,
        max_length=4096,
        epsilon=1e-5,
        tie_embeddings=False,
    )


def llama3(
    width: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden: int
) -> TransformerConfig:
    """Llama 3.

    References:
        Llama team 2024, "The Llama 3 herd of models". https://arxiv.org/abs/2407.21783
    """
    return dataclasses.replace(
        llama2(width, num_layers, num_heads, num_kv_heads, hidden),
        vocab_size=128256,
        max_length=8192,
        rope=Rope(500_000.0),
    )


def llama31(
    width: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden: int
) -> TransformerConfig:
    """Llama 3.1: Llama 3 for texts of up to 131,072 tokens.

    References:
        Llama team 2024, "The Llama 3 herd of models". https://arxiv.org/abs/2407.21783
    """
    return dataclasses.replace(
        llama3(width, num_layers, num_heads, num_kv_heads, hidden),
        max_length=131_072,
        rope=Rope(500_000.0, kind="llama3", factor=8.0, length=8192, fast=4.0, slow=1.0),
    )


def mistral_7b() -> TransformerConfig:
    """Mistral 7B, version 0.1, the one with windows.

    References:
        Jiang et al. 2023. https://arxiv.org/abs/2310.06825
    """
    return dataclasses.replace(
        llama2(4096, 32, 32, 8, 14336), max_length=32_768, windows=(4096,) * 32
    )


def mixtral_8x7b() -> TransformerConfig:
    """Mixtral: Mistral 7B with eight experts and without windows.

    References:
        Jiang et al. 2024, "Mixtral of experts". https://arxiv.org/abs/2401.04088
    """
    return dataclasses.replace(
        mistral_7b(),
        windows=(),
        rope=Rope(1_000_000.0),
        experts=ExpertsConfig(number=8, count=2, hidden=14336),
    )


def olmo2_7b() -> TransformerConfig:
    """OLMo 2 with seven billion parameters, of November 2024.

    References:
        OLMo team 2025, "2 OLMo 2 furious". https://arxiv.org/abs/2501.00656
    """
    return dataclasses.replace(
        llama2(4096, 32, 32, 32, 11008),
        vocab_size=100_352,
        epsilon=1e-6,
        rope=Rope(500_000.0),
        qk_norm="whole",
        order="branch",
    )


def qwen3(
    width: int, num_layers: int, num_heads: int, hidden: int, *, tie_embeddings: bool
) -> TransformerConfig:
    """Qwen3, dense; all sizes have eight heads of keys.

    References:
        Qwen team 2025, "Qwen3 technical report". https://arxiv.org/abs/2505.09388
    """
    return TransformerConfig(
        151_936,
        width,
        num_layers,
        num_heads,
        num_kv_heads=8,
        head_dim=128,
        hidden=hidden,
        max_length=40_960,
        rope=Rope(1_000_000.0),
        qk_norm=True,
        tie_embeddings=tie_embeddings,
    )


def gemma2(
    width: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden: int
) -> TransformerConfig:
    """Gemma 2 in the sizes 2B and 9B, whose logits of attention are scaled as usual.

    References:
        Gemma team 2024. https://arxiv.org/abs/2408.00118
    """
    return TransformerConfig(
        256_000,
        width,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim=256,
        hidden=hidden,
        max_length=8192,
        norm="rms_plus_one",
        order="sandwich",
        activation="gelu_tanh",
        embed_scale=math.sqrt(width),
        scale=256**-0.5,
        windows=_all_but_every(2, 4096, num_layers),
        softcap=50.0,
        logit_softcap=30.0,
    )


def gemma3_1b() -> TransformerConfig:
    """Gemma 3 with a billion parameters, which reads text alone.

    References:
        Gemma team 2025. https://arxiv.org/abs/2503.19786
    """
    return dataclasses.replace(
        gemma2(1152, 26, 4, 1, 6912),
        vocab_size=262_144,
        max_length=32_768,
        windows=_all_but_every(6, 512, 26),
        rope=Rope(1_000_000.0),
        local_rope=Rope(10_000.0),
        qk_norm=True,
        softcap=None,
        logit_softcap=None,
    )


def gpt_oss(num_layers: int, num_experts: int) -> TransformerConfig:
    """gpt-oss.

    References:
        OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card". https://arxiv.org/abs/2508.10925
    """
    return TransformerConfig(
        201_088,
        2880,
        num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        hidden=2880,
        max_length=131_072,
        epsilon=1e-5,
        tie_embeddings=False,
        rope=Rope(150_000.0, kind="yarn", factor=32.0, length=4096, truncate=False),
        windows=_all_but_every(2, 128, num_layers),
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        experts=ExpertsConfig(num_experts, count=4, hidden=2880, unit="clamped", use_bias=True),
    )


def deepseek_v3() -> TransformerConfig:
    """DeepSeek-V3, without the layer that predicts one more token.

    References:
        DeepSeek-AI 2024, "DeepSeek-V3 technical report". https://arxiv.org/abs/2412.19437
    """
    return TransformerConfig(
        129_280,
        7168,
        61,
        num_heads=128,
        num_kv_heads=128,
        head_dim=64,
        hidden=18_432,
        max_length=163_840,
        tie_embeddings=False,
        rope=Rope(interleaved=True, kind="yarn", factor=40.0, length=4096, gain=1.0),
        scale=yarn_gain(40.0) ** 2 * (64 + 128) ** -0.5,
        latent=LatentConfig(rank=512, query_rank=1536, plain_dim=128, value_dim=128),
        experts=ExpertsConfig(
            256,
            count=8,
            hidden=2048,
            router="sigmoid",
            groups=8,
            top_groups=4,
            factor=2.5,
            shared=2048,
            first=3,
        ),
    )


def bert(
    vocab_size: int = 30522,
    width: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    *,
    max_length: int = 512,
    token_types: int = 2,
) -> TransformerConfig:
    """BERT with its head for masked words; the defaults are those of the base model, uncased.

    References:
        Devlin et al. 2019, section 3. https://arxiv.org/abs/1810.04805
    """
    return TransformerConfig(
        vocab_size,
        width,
        num_layers,
        num_heads,
        num_heads,
        width // num_heads,
        4 * width,
        positions="learned",
        max_length=max_length,
        token_types=token_types,
        embed_norm=True,
        order="post",
        final_norm=False,
        epsilon=1e-12,
        activation="gelu",
        head_transform="gelu",
        head_bias=True,
        **_AFFINE,
    )


def roberta_base() -> TransformerConfig:
    """RoBERTa, base, with its head for masked words.

    References:
        Liu et al. 2019. https://arxiv.org/abs/1907.11692
    """
    return dataclasses.replace(
        bert(50265, token_types=1), epsilon=1e-5, pad_token=1, position_offset=2
    )


def modernbert_base() -> TransformerConfig:
    """ModernBERT, base, with its head for masked words.

    References:
        Warner et al. 2024. https://arxiv.org/abs/2412.13663
    """
    return TransformerConfig(
        50368,
        768,
        22,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        hidden=1152,
        max_length=8192,
        norm="layer_without_bias",
        epsilon=1e-5,
        embed_norm=True,
        first_norm=False,
        activation="gelu",
        rope=Rope(160_000.0),
        local_rope=Rope(10_000.0),
        windows=tuple(65 if layer % 3 else None for layer in range(22)),
        ahead=64,
        head_transform="gelu",
        head_bias=True,
    )


def t5(width: int, num_layers: int, num_heads: int, hidden: int) -> TransformerConfig:
    """T5 1.0 in the sizes that have heads of 64 channels.

    References:
        Raffel et al. 2020. https://arxiv.org/abs/1910.10683
    """
    return TransformerConfig(
        32128,
        width,
        num_layers,
        num_heads,
        num_heads,
        head_dim=64,
        hidden=hidden,
        positions="buckets",
        activation="relu",
        gated=False,
        scale=1.0,
        logit_scale=width**-0.5,
    )


def bart_base() -> TransformerConfig:
    """BART, base.

    References:
        Lewis et al. 2020. https://arxiv.org/abs/1910.13461
    """
    return TransformerConfig(
        50265,
        768,
        6,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        hidden=3072,
        positions="learned",
        max_length=1024,
        position_offset=2,
        embed_norm=True,
        order="post",
        final_norm=False,
        epsilon=1e-5,
        activation="gelu",
        head_bias=True,
        **_AFFINE,
    )


def _all_but_every(count: int, window: int, num_layers: int) -> tuple[int | None, ...]:
    """A window in each layer but the `count`-th, twice that, and so on."""
    return tuple(window if layer % count else None for layer in range(1, num_layers + 1))


DECODERS = {
    "gpt2_124m": gpt2(768, 12, 12),
    "gpt2_355m": gpt2(1024, 24, 16),
    "gpt2_774m": gpt2(1280, 36, 20),
    "gpt2_1.5b": gpt2(1600, 48, 25),
    "llama2_7b": llama2(4096, 32, 32, 32, 11008),
    "llama2_13b": llama2(5120, 40, 40, 40, 13824),
    "llama2_70b": llama2(8192, 80, 64, 8, 28672),
    "llama3_8b": llama3(4096, 32, 32, 8, 14336),
    "llama3_70b": llama3(8192, 80, 64, 8, 28672),
    "llama3.1_8b": llama31(4096, 32, 32, 8, 14336),
    "llama3.1_70b": llama31(8192, 80, 64, 8, 28672),
    "llama3.1_405b": llama31(16384, 126, 128, 8, 53248),
    "mistral_7b": mistral_7b(),
    "mixtral_8x7b": mixtral_8x7b(),
    "olmo2_7b": olmo2_7b(),
    "qwen3_0.6b": qwen3(1024, 28, 16, 3072, tie_embeddings=True),
    "qwen3_1.7b": qwen3(2048, 28, 16, 6144, tie_embeddings=True),
    "qwen3_4b": qwen3(2560, 36, 32, 9728, tie_embeddings=True),
    "qwen3_8b": qwen3(4096, 36, 32, 12288, tie_embeddings=False),
    "gemma2_2b": gemma2(2304, 26, 8, 4, 9216),
    "gemma2_9b": gemma2(3584, 42, 16, 8, 14336),
    "gemma3_1b": gemma3_1b(),
    "gpt_oss_20b": gpt_oss(24, 32),
    "gpt_oss_120b": gpt_oss(36, 128),
    "deepseek_v3": deepseek_v3(),
}
ENCODERS = {
    "bert_base": bert(),
    "bert_large": bert(30522, 1024, 24, 16),
    "roberta_base": roberta_base(),
    "modernbert_base": modernbert_base(),
}
ENCODER_DECODERS = {
    "t5_small": t5(512, 6, 8, 2048),
    "t5_base": t5(768, 12, 12, 3072),
    "bart_base": bart_base(),
}
