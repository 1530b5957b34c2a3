"""Gemma 1, 2 and 3 (text): gains of 1 + w, scaled embeddings, soft-caps, local layers."""

import functools
import math
from typing import Any

from jaxformer.interop import llama
from jaxformer.interop.families import Family
from jaxformer.interop.settings import Settings, write_rope
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops.rope import Rope


def _read(model_type: str, s: Settings) -> TransformerConfig:
    third = model_type == "gemma3_text"
    local_theta = s.take("rope_local_base_freq", 10_000.0) if third else None
    ropes = s.rope(1_000_000.0 if third else 10_000.0)
    rope = ropes.get("full_attention") or ropes[""]
    local = ropes.get("sliding_attention") or (Rope(float(local_theta)) if local_theta else None)
    s.only("use_bidirectional_attention", None, False)
    found: dict[str, Any] = {"head_dim": 256} | llama.sizes(s)
    old, new = s.take("hidden_act", None), s.take("hidden_activation", None)
    act = Settings({"hidden_activation": new or old}, s.where)
    found |= {
        "rope": rope,
        "norm": "rms_plus_one",
        "epsilon": s.take("rms_norm_eps", 1e-6),
        "tie_embeddings": s.take("tie_word_embeddings", True),
        "activation": act.choice("hidden_activation", llama.ACTIVATIONS, "gelu_pytorch_tanh"),
        "embed_scale": math.sqrt(found["width"]),
    }
    bias = s.take("attention_bias", False)
    found |= {"qkv_bias": bias, "out_bias": bias}
    if model_type != "gemma":
        layers = found["num_layers"]
        default = 6 if third else 2
        pattern = s.take("sliding_window_pattern", s.take("_sliding_window_pattern", default))
        kinds = s.take("layer_types", None) or [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(layers)
        ]
        window = s.take("sliding_window", 4096)
        inner = Settings({"sliding_window": window, "layer_types": kinds}, s.where)
        found |= {
            "order": "sandwich",
            "qk_norm": third,
            "scale": s.take("query_pre_attn_scalar", 256) ** -0.5,
            "windows": llama.windows(inner, layers, default=None),
            "local_rope": local,
            "softcap": s.take("attn_logit_softcapping", None if third else 50.0),
            "logit_softcap": s.take("final_logit_softcapping", None if third else 30.0),
        }
    return TransformerConfig(**found)


def _write(model_type: str, config: TransformerConfig) -> dict[str, Any]:
    found = llama.written_sizes(config)
    found["hidden_activation"] = found["hidden_act"]
    if model_type == "gemma":
        return found | {"attention_bias": config.out_bias}
    del found["hidden_act"]
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    found |= llama.written_windows(config) | {
        "attention_bias": config.out_bias,
        "attn_logit_softcapping": config.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "query_pre_attn_scalar": _whole(scale**-2),
    }
    if model_type == "gemma3_text":
        assert config.local_rope is not None
        found["rope_parameters"] = {
            "full_attention": write_rope(config.rope, config.max_length),
            "sliding_attention": write_rope(config.local_rope, config.max_length),
        }
    return found


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x


FAMILIES = {
    name: Family(
        name,
        f"{kind}ForCausalLM",
        Decoder,
        functools.partial(_read, name),
        functools.partial(_write, name),
        llama.rules,
    )
    for name, kind in {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}.items()
}
