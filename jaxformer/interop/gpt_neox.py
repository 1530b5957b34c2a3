"""GPT-NeoX and Pythia: both branches beside each other, a share of the channels rotary."""

from typing import Any

from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, interleaved, same, turned
from jaxformer.interop.settings import Settings, write_rope
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig


def _read(s: Settings) -> TransformerConfig:
    rope = s.rope()[""]
    width, heads = s.take("hidden_size"), s.take("num_attention_heads")
    bias = s.take("attention_bias", True)
    s.take("is_decoder", None)  # it always is one
    return TransformerConfig(
        vocab_size=s.take("vocab_size"),
        width=width,
        num_layers=s.take("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden=s.take("intermediate_size"),
        max_length=s.take("max_position_embeddings", 0),
        rope=rope,
        norm="layer",
        epsilon=s.take("layer_norm_eps", 1e-5),
        order="parallel" if s.take("use_parallel_residual", True) else "pre",
        activation=s.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tie_embeddings=s.take("tie_word_embeddings", False),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.epsilon,
        "use_parallel_residual": config.order == "parallel",
        "hidden_act": WRITTEN[config.activation],
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": write_rope(config.rope, config.max_length),
        "rotary_pct": config.rope.fraction,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    found = [same("embed/table", "gpt_neox.embed_in.weight")]
    norms = {"attention/norm": "input_layernorm", "mlp/norm": "post_attention_layernorm"}
    for i in range(config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", f"gpt_neox.layers.{i}."
        qkv = f"{theirs}attention.query_key_value"
        found.append(
            interleaved(f"{ours}attention/inner/qkv/kernel", f"{qkv}.weight", config.num_heads)
        )
        if config.qkv_bias:
            found.append(
                interleaved(f"{ours}attention/inner/qkv/bias", f"{qkv}.bias", config.num_heads)
            )
        maps = {
            "attention/inner/out": ("attention.dense", config.out_bias),
            "mlp/inner/up": ("mlp.dense_h_to_4h", True),
            "mlp/inner/down": ("mlp.dense_4h_to_h", True),
        }
        for a, (b, bias) in maps.items():
            found.append(turned(f"{ours}{a}/kernel", f"{theirs}{b}.weight"))
            found += [same(f"{ours}{a}/bias", f"{theirs}{b}.bias")] * bias
        for a, b in norms.items():
            found.append(same(f"{ours}{a}/scale", f"{theirs}{b}.weight"))
            found.append(same(f"{ours}{a}/bias", f"{theirs}{b}.bias"))
    found.append(same("norm/scale", "gpt_neox.final_layer_norm.weight"))
    found.append(same("norm/bias", "gpt_neox.final_layer_norm.bias"))
    if not config.tie_embeddings:
        found.append(turned("head/kernel", "embed_out.weight"))
    return found


FAMILIES = {
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        Decoder,
        _read,
        _write,
        _rules,
        prefix="gpt_neox.",
        tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
        unused=(r".*rotary_emb\.inv_freq", r".*\.attention\.(masked_)?bias"),
    )
}
