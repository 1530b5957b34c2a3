"""Llama and its kin: rotary positions, RMSNorm, grouped queries; the rest is in the settings."""

import functools
from typing import Any

from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, joined, same, scalar, turned
from jaxformer.interop.settings import Settings, write_rope
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "xielu": "xielu",
}
WRITTEN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu_squared": "relu2",
    "silu": "silu",
    "xielu": "xielu",
}


def sizes(s: Settings) -> dict[str, Any]:
    """What all of them say alike."""
    width, heads = s.take("hidden_size"), s.take("num_attention_heads")
    return {
        "vocab_size": s.take("vocab_size"),
        "width": width,
        "num_layers": s.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": s.take("num_key_value_heads", heads),
        "head_dim": s.take("head_dim", width // heads),
        "hidden": s.take("intermediate_size"),
        "max_length": s.take("max_position_embeddings", 0),
    }


def written_sizes(config: TransformerConfig) -> dict[str, Any]:
    """The way back."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "hidden_act": WRITTEN[config.activation],
        "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": write_rope(config.rope, config.max_length),
    }


def windows(s: Settings, layers: int, *, default: int | None, every: bool = True) -> Any:
    """Which layers have a window: those that `layer_types` names, else all or none."""
    window, kinds = s.take("sliding_window", default), s.take("layer_types", None)
    if kinds is None:
        return (window,) * layers if every and window is not None else ()
    known = {"full_attention": None, "sliding_attention": window}
    if {*kinds} - {*known} or len(kinds) != layers:
        raise ValueError(f"{s.where}: layer_types={kinds!r} is not supported for {layers} layers.")
    found = tuple(known[kind] for kind in kinds)
    return found if any(x is not None for x in found) else ()


def written_windows(config: TransformerConfig) -> dict[str, Any]:
    """The way back."""
    if not config.windows:
        return {"sliding_window": None}
    kinds = ["full_attention" if x is None else "sliding_attention" for x in config.windows]
    return {
        "sliding_window": next(x for x in config.windows if x is not None),
        "layer_types": kinds,
    }


def _read(model_type: str, s: Settings) -> TransformerConfig:
    defaults = {"mistral": 1e-6, "olmo2": 1e-5, "apertus": 1e-5}
    theta = {"olmo2": 10_000.0, "apertus": 12_000_000.0}.get(model_type, 10_000.0)
    found: dict[str, Any] = {"rope": s.rope(theta)[""]} | sizes(s)
    found["epsilon"] = s.take("rms_norm_eps", defaults.get(model_type, 1e-6))
    found["tie_embeddings"] = s.take("tie_word_embeddings", False)
    act = "xielu" if model_type == "apertus" else "silu"
    found["activation"] = s.choice("hidden_act", ACTIVATIONS, act)
    found["gated"] = model_type != "apertus"
    bias = s.take("attention_bias", False) if model_type not in ("mistral", "qwen2") else False
    found |= {"qkv_bias": bias or model_type == "qwen2", "out_bias": bias}
    if model_type in ("llama", "apertus"):
        found["mlp_bias"] = s.take("mlp_bias", False)
    if model_type in ("qwen3", "apertus"):
        found["qk_norm"] = True
    if model_type == "olmo2":
        found |= {"qk_norm": "whole", "order": "branch"}
    layers = found["num_layers"]
    if model_type == "mistral":
        default = 4096 if s.absent("sliding_window") else None
        found["windows"] = windows(s, layers, default=default)
    if model_type in ("qwen2", "qwen3"):
        found["windows"] = _qwen_windows(s, layers)
    return TransformerConfig(**found)


def _qwen_windows(s: Settings, layers: int) -> tuple[int | None, ...]:
    """From `max_window_layers` on, if windows are used at all."""
    used, first = s.take("use_sliding_window", False), s.take("max_window_layers", 28)
    window, kinds = s.take("sliding_window", 4096), s.take("layer_types", None)
    if not used:
        window = None
    if kinds is None:
        kinds = [
            "sliding_attention" if used and i >= first else "full_attention" for i in range(layers)
        ]
    inner = Settings({"sliding_window": window, "layer_types": kinds}, s.where)
    return windows(inner, layers, default=None)


def _write(model_type: str, config: TransformerConfig) -> dict[str, Any]:
    found = written_sizes(config)
    if model_type not in ("mistral", "qwen2"):
        found["attention_bias"] = config.out_bias
    if model_type in ("llama", "apertus"):
        found["mlp_bias"] = config.mlp_bias
    if model_type == "mistral":
        found |= written_windows(config)
        found.pop("layer_types", None)
    if model_type in ("qwen2", "qwen3"):
        found |= {"use_sliding_window": bool(config.windows)} | written_windows(config)
        found["max_window_layers"] = config.num_layers
    return found


def rules(
    config: TransformerConfig,
    attention: Any = None,
    mlp: Any = None,
    norms: dict[str, str] | None = None,
) -> list[Rule]:
    """The tensors of a decoder of this lineage.

    Args:
        config: Of the decoder.
        attention: The rules of a layer's attention, of the config and the two paths; those of
            grouped queries if None.
        mlp: Likewise of its MLP.
        norms: Our names of a layer's norms by theirs; the usual for the config's order if None.
    """
    found = [same("embed/table", "model.embed_tokens.weight")]
    for i in range(config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", f"model.layers.{i}."
        of_attention, of_mlp = attention or attention_rules, mlp or mlp_rules
        found += of_attention(config, ours + "attention/inner/", theirs + "self_attn.")
        found += of_mlp(config, ours + "mlp/inner/", theirs + "mlp.")
        names = NORMS[config.order] if norms is None else norms
        found += [same(f"{ours}{a}/scale", f"{theirs}{b}.weight") for a, b in names.items()]
    found.append(same("norm/scale", "model.norm.weight"))
    if not config.tie_embeddings:
        found.append(turned("head/kernel", "lm_head.weight"))
    return found


NORMS = {
    "pre": {"attention/norm": "input_layernorm", "mlp/norm": "post_attention_layernorm"},
    "branch": {
        "attention/norm": "post_attention_layernorm",
        "mlp/norm": "post_feedforward_layernorm",
    },
    "sandwich": {
        "attention/norm": "input_layernorm",
        "attention/norm_out": "post_attention_layernorm",
        "mlp/norm": "pre_feedforward_layernorm",
        "mlp/norm_out": "post_feedforward_layernorm",
    },
}
_APERTUS = {"attention/norm": "attention_layernorm", "mlp/norm": "feedforward_layernorm"}


def attention_rules(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    """The tensors of one self-attention."""
    outputs = [n * config.head_dim for n in (config.num_heads, *(config.num_kv_heads,) * 2)]
    fused = [f"{theirs}{x}_proj" for x in "qkv"]
    found = [
        joined(f"{ours}qkv/kernel", [f"{x}.weight" for x in fused], outputs),
        turned(f"{ours}out/kernel", f"{theirs}o_proj.weight"),
    ]
    if config.qkv_bias:
        found.append(joined(f"{ours}qkv/bias", [f"{x}.bias" for x in fused], outputs))
    if config.out_bias:
        found.append(same(f"{ours}out/bias", f"{theirs}o_proj.bias"))
    if config.qk_norm:
        found += [same(f"{ours}{x}_norm/scale", f"{theirs}{x}_norm.weight") for x in "qk"]
    if config.sinks:
        found.append(same(f"{ours}sinks", f"{theirs}sinks"))
    return found


def mlp_rules(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    """The tensors of one MLP."""
    wide = [f"{theirs}{x}_proj" for x in (("gate", "up") if config.gated else ("up",))]
    outputs = [config.hidden] * len(wide)
    found = [
        joined(f"{ours}up/kernel", [f"{x}.weight" for x in wide], outputs),
        turned(f"{ours}down/kernel", f"{theirs}down_proj.weight"),
    ]
    if config.mlp_bias:
        found.append(joined(f"{ours}up/bias", [f"{x}.bias" for x in wide], outputs))
        found.append(same(f"{ours}down/bias", f"{theirs}down_proj.bias"))
    if config.activation == "xielu":
        numbers = {"positive": "alpha_p", "negative": "alpha_n"}
        found += [
            scalar(f"{ours}activation/{a}", f"{theirs}act_fn.{b}") for a, b in numbers.items()
        ]
    return found


FAMILIES = {
    name: Family(
        name,
        f"{kind}ForCausalLM",
        Decoder,
        functools.partial(_read, name),
        functools.partial(_write, name),
        functools.partial(rules, norms=_APERTUS) if name == "apertus" else rules,
        unused=(r".*rotary_emb\.inv_freq", r".*act_fn\.(beta|eps)"),
    )
    for name, kind in {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "olmo2": "Olmo2",
        "apertus": "Apertus",
    }.items()
}
