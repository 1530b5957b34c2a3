"""Bloom: ALiBi, normalised embeddings."""

from typing import Any

from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, interleaved, same, turned
from jaxformer.interop.settings import Settings
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig


def _read(s: Settings) -> TransformerConfig:
    old, width = s.take("n_embed", None), s.take("hidden_size", 64)
    width, heads = old or width, s.take("n_head", 8)
    s.only("apply_residual_connection_post_layernorm", False)
    s.take("offset_alibi", None)
    s.take("unk_token_id", None)
    s.take("seq_length", None)
    return TransformerConfig(
        vocab_size=s.take("vocab_size", 250_880),
        width=width,
        num_layers=s.take("n_layer", 2),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden=4 * width,
        positions="alibi",
        norm="layer",
        epsilon=s.take("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_norm=True,
        tie_embeddings=s.take("tie_word_embeddings", True),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    def both(ours: str, theirs: str) -> list[Rule]:
        return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]

    found = [same("embed/table", "transformer.word_embeddings.weight")]
    found += both("norm_in", "transformer.word_embeddings_layernorm")
    maps = {
        "attention/inner/out": "self_attention.dense",
        "mlp/inner/up": "mlp.dense_h_to_4h",
        "mlp/inner/down": "mlp.dense_4h_to_h",
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", f"transformer.h.{i}."
        qkv = f"{theirs}self_attention.query_key_value"
        for a, b in (("kernel", "weight"), ("bias", "bias")):
            found.append(
                interleaved(f"{ours}attention/inner/qkv/{a}", f"{qkv}.{b}", config.num_heads)
            )
        for a, b in maps.items():
            found.append(turned(f"{ours}{a}/kernel", f"{theirs}{b}.weight"))
            found.append(same(f"{ours}{a}/bias", f"{theirs}{b}.bias"))
        found += both(f"{ours}attention/norm", f"{theirs}input_layernorm")
        found += both(f"{ours}mlp/norm", f"{theirs}post_attention_layernorm")
    found += both("norm", "transformer.ln_f")
    if not config.tie_embeddings:
        found.append(turned("head/kernel", "lm_head.weight"))
    return found


FAMILIES = {
    "bloom": Family(
        "bloom",
        "BloomForCausalLM",
        Decoder,
        _read,
        _write,
        _rules,
        prefix="transformer.",
        tied=(("lm_head.weight", "transformer.word_embeddings.weight"),),
        unused=(),
    )
}
