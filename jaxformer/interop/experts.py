"""Mixtral, gpt-oss and DeepSeek-V3: mixtures of experts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxformer.interop import llama
from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, joined, same, turned
from jaxformer.interop.settings import Settings, write_rope
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig
from jaxformer.ops.rope import yarn_gain


def stacked(ours: str, theirs: Sequence[Sequence[str]]) -> Rule:
    """One matrix for each expert: side by side those of one, on top of each other all of them."""
    parts = len(theirs[0])

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        groups = [xs[i : i + parts] for i in range(0, len(xs), parts)]
        return np.stack([np.concatenate([x.T for x in group], axis=-1) for group in groups])

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        return [part.T for one in x for part in np.split(one, parts, axis=-1)]

    return Rule(ours, tuple(name for names in theirs for name in names), take, give)


def alternating(ours: str, theirs: str) -> Rule:
    """Gates and values in turn along the last axis there, all gates before all values here."""

    def take(xs: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([xs[0][..., ::2], xs[0][..., 1::2]], axis=-1)

    def give(x: np.ndarray) -> Sequence[np.ndarray]:
        return (np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape),)

    return Rule(ours, (theirs,), take, give)


def _balance(s: Settings) -> None:
    """Settings of the loss in training."""
    s.take("output_router_logits", None)
    s.take("router_aux_loss_coef", None)
    s.take("router_jitter_noise", None)


def _read_mixtral(s: Settings) -> TransformerConfig:
    found: dict[str, Any] = {"rope": s.rope(1_000_000.0)[""]} | llama.sizes(s)
    _balance(s)
    experts = ExpertsConfig(
        s.take("num_local_experts", 8), s.take("num_experts_per_tok", 2), found["hidden"]
    )
    return TransformerConfig(
        **found,
        epsilon=s.take("rms_norm_eps", 1e-5),
        tie_embeddings=s.take("tie_word_embeddings", False),
        activation=s.choice("hidden_act", llama.ACTIVATIONS, "silu"),
        windows=llama.windows(s, found["num_layers"], default=None),
        experts=experts,
    )


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    assert config.experts is not None
    found = llama.written_sizes(config) | llama.written_windows(config)
    found.pop("layer_types", None)
    return found | {
        "num_local_experts": config.experts.number,
        "num_experts_per_tok": config.experts.count,
        "intermediate_size": config.experts.hidden,
    }


def _mixtral_mlp(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    assert config.experts is not None
    theirs = theirs.replace(".mlp.", ".block_sparse_moe.")
    each = [f"{theirs}experts.{e}." for e in range(config.experts.number)]
    return [
        turned(f"{ours}router/kernel", f"{theirs}gate.weight"),
        stacked(f"{ours}up_kernel", [(f"{x}w1.weight", f"{x}w3.weight") for x in each]),
        stacked(f"{ours}down_kernel", [(f"{x}w2.weight",) for x in each]),
    ]


def _read_gpt_oss(s: Settings) -> TransformerConfig:
    found: dict[str, Any] = {"rope": s.rope(150_000.0)[""]} | llama.sizes(s)
    _balance(s)
    experts = ExpertsConfig(
        s.take("num_local_experts", 128),
        s.take("num_experts_per_tok", s.take("experts_per_token", 4)),
        found["hidden"],
        unit="clamped",
        limit=s.take("swiglu_limit", 7.0),
        steepness=s.take("swiglu_alpha", 1.702),
        use_bias=True,
    )
    s.only("hidden_act", "silu")
    bias = s.take("attention_bias", True)
    return TransformerConfig(
        **found,
        epsilon=s.take("rms_norm_eps", 1e-5),
        tie_embeddings=s.take("tie_word_embeddings", False),
        windows=llama.windows(s, found["num_layers"], default=128, every=False),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        experts=experts,
    )


def _write_gpt_oss(config: TransformerConfig) -> dict[str, Any]:
    assert config.experts is not None
    return (
        llama.written_sizes(config)
        | llama.written_windows(config)
        | {
            "attention_bias": config.out_bias,
            "num_local_experts": config.experts.number,
            "num_experts_per_tok": config.experts.count,
            "intermediate_size": config.experts.hidden,
            "swiglu_limit": config.experts.limit,
            "swiglu_alpha": config.experts.steepness,
        }
    )


def _gpt_oss_mlp(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    return [
        turned(f"{ours}router/kernel", f"{theirs}router.weight"),
        same(f"{ours}router/bias", f"{theirs}router.bias"),
        alternating(f"{ours}up_kernel", f"{theirs}experts.gate_up_proj"),
        alternating(f"{ours}up_bias", f"{theirs}experts.gate_up_proj_bias"),
        same(f"{ours}down_kernel", f"{theirs}experts.down_proj"),
        same(f"{ours}down_bias", f"{theirs}experts.down_proj_bias"),
    ]


def _read_deepseek(s: Settings) -> TransformerConfig:
    heads, width = s.take("num_attention_heads"), s.take("hidden_size")
    s.only("num_key_value_heads", heads)
    turning, plain = s.take("qk_rope_head_dim", 64), s.take("qk_nope_head_dim", 128)
    s.only("head_dim", turning)
    s.only("qk_head_dim", turning + plain)
    gain = 1.0
    given = s.look("rope_parameters", None) or s.look("rope_scaling", None) or {}
    if given.get("rope_type", given.get("type")) == "yarn" and given.get("mscale_all_dim"):
        gain = yarn_gain(float(given["factor"]), float(given["mscale_all_dim"])) ** 2
    rope = s.rope()[""]
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "output_router_logits"):
        s.take(name, None)  # layers that no checkpoint of transformers has
    s.only("topk_method", "noaux_tc")
    s.only("scoring_func", "sigmoid")
    s.only("moe_layer_freq", 1)
    s.take("aux_loss_alpha", None)
    s.take("seq_aux", None)
    interleaved = s.take("rope_interleave", True)
    bias = s.take("attention_bias", False)
    hidden = s.take("moe_intermediate_size", 2048)
    return TransformerConfig(
        vocab_size=s.take("vocab_size"),
        width=width,
        num_layers=s.take("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=turning,
        hidden=s.take("intermediate_size"),
        max_length=s.take("max_position_embeddings", 0),
        rope=dataclasses.replace(rope, interleaved=interleaved),
        epsilon=s.take("rms_norm_eps", 1e-6),
        tie_embeddings=s.take("tie_word_embeddings", False),
        activation=s.choice("hidden_act", llama.ACTIVATIONS, "silu"),
        out_bias=bias,
        scale=None if gain == 1.0 else gain * (turning + plain) ** -0.5,
        latent=LatentConfig(
            rank=s.take("kv_lora_rank", 512),
            query_rank=s.take("q_lora_rank", None),
            plain_dim=plain,
            value_dim=s.take("v_head_dim", 128),
        ),
        experts=ExpertsConfig(
            s.take("n_routed_experts", s.take("num_local_experts", 256)),
            s.take("num_experts_per_tok", 8),
            hidden,
            router="sigmoid",
            groups=s.take("n_group", 8),
            top_groups=s.take("topk_group", 4),
            normalize=s.take("norm_topk_prob", True),
            factor=s.take("routed_scaling_factor", 2.5),
            shared=hidden * s.take("n_shared_experts", 1),
            first=s.take("first_k_dense_replace", 3),
        ),
    )


def _write_deepseek(config: TransformerConfig) -> dict[str, Any]:
    experts, latent = config.experts, config.latent
    assert experts is not None
    assert latent is not None
    found = llama.written_sizes(config)
    rope = write_rope(config.rope, config.max_length)
    if config.scale is not None:
        raise ValueError("the scale of a stretched text is not written")
    return found | {
        "head_dim": config.head_dim,
        "rope_parameters": rope,
        "rope_interleave": config.rope.interleaved,
        "attention_bias": config.out_bias,
        "qk_rope_head_dim": config.head_dim,
        "qk_nope_head_dim": latent.plain_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "moe_intermediate_size": experts.hidden,
        "n_routed_experts": experts.number,
        "num_experts_per_tok": experts.count,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "norm_topk_prob": experts.normalize,
        "routed_scaling_factor": experts.factor,
        "n_shared_experts": experts.shared // experts.hidden,
        "first_k_dense_replace": experts.first,
    }


def _latent_rules(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    assert config.latent is not None
    found = [
        turned(f"{ours}kv_down/kernel", f"{theirs}kv_a_proj_with_mqa.weight"),
        same(f"{ours}kv_norm/scale", f"{theirs}kv_a_layernorm.weight"),
        turned(f"{ours}kv_up", f"{theirs}kv_b_proj.weight"),
        turned(f"{ours}out/kernel", f"{theirs}o_proj.weight"),
    ]
    if config.latent.query_rank is None:
        found.append(turned(f"{ours}q/kernel", f"{theirs}q_proj.weight"))
    else:
        found.append(turned(f"{ours}q_down/kernel", f"{theirs}q_a_proj.weight"))
        found.append(same(f"{ours}q_norm/scale", f"{theirs}q_a_layernorm.weight"))
        found.append(turned(f"{ours}q/kernel", f"{theirs}q_b_proj.weight"))
    if config.out_bias:
        biased = {"kv_down": "kv_a_proj_with_mqa", "out": "o_proj"}
        if config.latent.query_rank is not None:
            biased["q_down"] = "q_a_proj"
        found += [same(f"{ours}{a}/bias", f"{theirs}{b}.bias") for a, b in biased.items()]
    return found


def _deepseek_mlp(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    experts = config.experts
    assert experts is not None
    if int(theirs.split(".")[2]) < experts.first:
        return llama.mlp_rules(config, ours, theirs)
    each = [f"{theirs}experts.{e}." for e in range(experts.number)]
    shared = f"{theirs}shared_experts."
    fused = [f"{shared}gate_proj.weight", f"{shared}up_proj.weight"]
    return [
        turned(f"{ours}router/kernel", f"{theirs}gate.weight"),
        same(f"{ours}correction", f"{theirs}gate.e_score_correction_bias"),
        stacked(f"{ours}up_kernel", [(f"{x}gate_proj.weight", f"{x}up_proj.weight") for x in each]),
        stacked(f"{ours}down_kernel", [(f"{x}down_proj.weight",) for x in each]),
        joined(f"{ours}shared/up/kernel", fused, [experts.shared] * 2),
        turned(f"{ours}shared/down/kernel", f"{shared}down_proj.weight"),
    ]


FAMILIES = {
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        Decoder,
        _read_mixtral,
        _write_mixtral,
        functools.partial(llama.rules, mlp=_mixtral_mlp),
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        Decoder,
        _read_gpt_oss,
        _write_gpt_oss,
        functools.partial(llama.rules, mlp=_gpt_oss_mlp),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        Decoder,
        _read_deepseek,
        _write_deepseek,
        functools.partial(llama.rules, mlp=_deepseek_mlp, attention=_latent_rules),
        unused=(r".*rotary_emb\.inv_freq",),
    ),
}
