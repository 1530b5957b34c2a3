"""GPT-2: learned positions, LayerNorm before each branch, biases everywhere, tied embeddings."""

from typing import Any

from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, same
from jaxformer.interop.settings import Settings
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig


def _read(s: Settings) -> TransformerConfig:
    width, heads = s.take("n_embd", 768), s.take("n_head", 12)
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("reorder_and_upcast_attn", False, True)  # another order of the same sums
    s.take("n_ctx", None)
    return TransformerConfig(
        vocab_size=s.take("vocab_size", 50_257),
        width=width,
        num_layers=s.take("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden=s.take("n_inner", 4 * width),
        max_length=s.take("n_positions", 1024),
        positions="learned",
        norm="layer",
        epsilon=s.take("layer_norm_epsilon", 1e-5),
        activation=s.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=s.take("tie_word_embeddings", True),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.hidden,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.epsilon,
        "activation_function": WRITTEN[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    found = [same("embed/table", "transformer.wte.weight")]
    found.append(same("places/table", "transformer.wpe.weight"))
    maps = {
        "attention/inner/qkv": "attn.c_attn",
        "attention/inner/out": "attn.c_proj",
        "mlp/inner/up": "mlp.c_fc",
        "mlp/inner/down": "mlp.c_proj",
    }
    norms = {"attention/norm": "ln_1", "mlp/norm": "ln_2"}
    for i in range(config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", f"transformer.h.{i}."
        for parts, name in ((maps, "kernel"), (norms, "scale")):
            for a, b in parts.items():  # its maps are stored input by output, as ours are
                found.append(same(f"{ours}{a}/{name}", f"{theirs}{b}.weight"))
                found.append(same(f"{ours}{a}/bias", f"{theirs}{b}.bias"))
    found.append(same("norm/scale", "transformer.ln_f.weight"))
    found.append(same("norm/bias", "transformer.ln_f.bias"))
    if not config.tie_embeddings:
        from jaxformer.interop.rules import turned

        found.append(turned("head/kernel", "lm_head.weight"))
    return found


FAMILIES = {
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        Decoder,
        _read,
        _write,
        _rules,
        prefix="transformer.",
        tied=(("lm_head.weight", "transformer.wte.weight"),),
        unused=(r".*\.attn\.(masked_)?bias",),
    )
}
