"""BART: learned positions, LayerNorm after each branch and over the embeddings, biases."""

import math
from typing import Any

import numpy as np

from jaxformer.interop.families import Family, texts
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, joined, same, turned
from jaxformer.interop.settings import Settings
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig

# What says how a model was trained or how it is to write, not what it computes.
_PASSED_OVER = (
    "_num_labels",
    "activation_dropout",
    "add_bias_logits",
    "bad_words_ids",
    "classif_dropout",
    "decoder_layerdrop",
    "do_sample",
    "dropout",
    "dropout_rate",
    "early_stopping",
    "encoder_layerdrop",
    "force_bos_token_to_be_generated",
    "init_std",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "output_past",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)


def pass_over(s: Settings) -> None:
    """Takes what says nothing of the numbers that an encoder-decoder computes."""
    for name in _PASSED_OVER:
        s.take(name, None)
    s.only("is_encoder_decoder", True)
    s.only("is_decoder", False)


def sizes(s: Settings) -> dict[str, Any]:
    """What BART and Marian say alike; both halves must have heads and MLPs of one size."""
    pass_over(s)
    width, layers = s.take("d_model", 1024), s.take("encoder_layers", 12)
    decoder_layers = s.take("decoder_layers", 12)
    alike = {}
    for name, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        alike[name], other = (s.take(f"{half}_{name}", default) for half in ("encoder", "decoder"))
        if other != alike[name]:
            raise ValueError(
                f"{s.where}: decoder_{name}={other} is not supported beside encoder_{name}="
                f"{alike[name]}."
            )
    heads = alike["attention_heads"]
    if width % heads:
        raise ValueError(f"{s.where}: d_model={width} is not a multiple of {heads} heads.")
    s.only("num_hidden_layers", layers)
    for name in ("normalize_before", "add_final_layer_norm"):
        s.only(name, False)
    return {
        "vocab_size": s.take("vocab_size"),
        "width": width,
        "num_layers": layers,
        "decoder_layers": None if decoder_layers == layers else decoder_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "hidden": alike["ffn_dim"],
        "max_length": s.take("max_position_embeddings", 1024),
        "norm": "layer",
        "epsilon": 1e-5,
        "order": "post",
        "final_norm": False,
        "activation": s.choice("activation_function", ACTIVATIONS, "gelu"),
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "embed_scale": math.sqrt(width) if s.take("scale_embedding", False) else 1.0,
        "tie_embeddings": s.take("tie_word_embeddings", True),
    }


def written_sizes(config: TransformerConfig) -> dict[str, Any]:
    """The way back."""
    layers = {"encoder": config.num_layers, "decoder": config.decoder_layers or config.num_layers}
    found: dict[str, Any] = {}
    for half, count in layers.items():
        found |= {
            f"{half}_layers": count,
            f"{half}_attention_heads": config.num_heads,
            f"{half}_ffn_dim": config.hidden,
        }
    return found | {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "max_position_embeddings": config.max_length,
        "activation_function": WRITTEN[config.activation],
        "scale_embedding": config.embed_scale != 1.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read(s: Settings) -> TransformerConfig:
    found = sizes(s)
    s.only("normalize_embedding", True)
    s.only("static_position_embeddings", False)
    s.only("extra_pos_embeddings", 2)
    tables = {} if found["tie_embeddings"] else {"decoder_vocab_size": found["vocab_size"]}
    return TransformerConfig(
        **found, **tables, positions="learned", position_offset=2, embed_norm=True
    )


def rules(config: TransformerConfig) -> list[Rule]:
    """The tensors of BART and Marian."""
    found = []
    layers = config.num_layers, config.decoder_layers or config.num_layers
    for ours, theirs, count in zip(("encoder/", ""), ("model.encoder.", "model.decoder."), layers):
        if config.decoder_vocab_size is not None:
            found.append(same(f"{ours}embed/table", f"{theirs}embed_tokens.weight"))
        if config.positions == "learned":
            found.append(same(f"{ours}places/table", f"{theirs}embed_positions.weight"))
        if config.embed_norm:
            found += _norm(f"{ours}norm_in", f"{theirs}layernorm_embedding")
        for i in range(count):
            found += _block(config, f"{ours}blocks/layers_{i}/", f"{theirs}layers.{i}.")
    if config.decoder_vocab_size is None:
        found.append(same("encoder/embed/table", "model.shared.weight"))
    if not config.tie_embeddings:
        found.append(turned("head/kernel", "lm_head.weight"))
    vocab_size = config.decoder_vocab_size or config.vocab_size
    found.append(
        Rule(
            "head_bias" if config.tie_embeddings else "head/bias",
            ("final_logits_bias",),
            lambda xs: xs[0][0] if xs else np.zeros(vocab_size, np.float32),
            lambda x: (x[None],),
            optional=True,
        )
    )
    return found


def _norm(ours: str, theirs: str) -> list[Rule]:
    names = {"scale": "weight", "bias": "bias"}
    return [same(f"{ours}/{a}", f"{theirs}.{b}") for a, b in names.items()]


def _block(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    found = _maps(f"{ours}attention/inner/", f"{theirs}self_attn.", {"qkv": "qkv"}, config.width)
    found += _norm(f"{ours}attention/norm", f"{theirs}self_attn_layer_norm")
    if theirs.startswith("model.decoder."):
        parts = {"q": "q", "kv": "kv"}
        found += _maps(f"{ours}cross/inner/", f"{theirs}encoder_attn.", parts, config.width)
        found += _norm(f"{ours}cross/norm", f"{theirs}encoder_attn_layer_norm")
    for a, b in {"up": "fc1", "down": "fc2"}.items():
        found.append(turned(f"{ours}mlp/inner/{a}/kernel", f"{theirs}{b}.weight"))
        found.append(same(f"{ours}mlp/inner/{a}/bias", f"{theirs}{b}.bias"))
    return found + _norm(f"{ours}mlp/norm", f"{theirs}final_layer_norm")


def _maps(ours: str, theirs: str, parts: dict[str, str], width: int) -> list[Rule]:
    found = []
    for a, letters in parts.items():
        names, widths = [f"{theirs}{x}_proj" for x in letters], [width] * len(letters)
        found.append(joined(f"{ours}{a}/kernel", [f"{x}.weight" for x in names], widths))
        found.append(joined(f"{ours}{a}/bias", [f"{x}.bias" for x in names], widths))
    found.append(turned(f"{ours}out/kernel", f"{theirs}out_proj.weight"))
    return [*found, same(f"{ours}out/bias", f"{theirs}out_proj.bias")]


TABLES = (
    "lm_head.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
)
FAMILIES = {
    "bart": Family(
        "bart",
        "BartForConditionalGeneration",
        EncoderDecoder,
        _read,
        written_sizes,
        rules,
        example=texts(2),
        tied=tuple((name, "model.shared.weight") for name in TABLES),
        unused=(r"(model\.)?shared\.weight",),  # of no use where each half has its own
    )
}
