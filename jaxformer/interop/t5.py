"""T5, 1.0 and 1.1: a bias for each distance, shared by the layers; attention without a scale."""

import dataclasses
from typing import Any

import numpy as np

from jaxformer.interop.bart import pass_over
from jaxformer.interop.families import Family, texts
from jaxformer.interop.llama import ACTIVATIONS
from jaxformer.interop.rules import Rule, joined, same, turned
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig

_GELU = "gated-gelu"  # of the tanh kind, as "gelu" alone is not


def _read(s: Settings) -> TransformerConfig:
    pass_over(s)
    s.take("n_positions", None)  # no bound
    width, layers = s.take("d_model", 512), s.take("num_layers", 6)
    written = s.take("feed_forward_proj", "relu")
    gated, name = written.startswith("gated-"), written.removeprefix("gated-")
    name = "gelu_new" if written == _GELU else name
    activation = Settings({"feed_forward_proj": name}, s.where).choice(
        "feed_forward_proj", ACTIVATIONS, "relu"
    )
    s.only("dense_act_fn", name)
    s.only("is_gated_act", gated)
    tied = s.take("tie_word_embeddings", True)
    scaled = s.take("scale_decoder_outputs", tied)
    heads, decoder_layers = s.take("num_heads", 8), s.take("num_decoder_layers", layers)
    return TransformerConfig(
        vocab_size=s.take("vocab_size", 32_128),
        width=width,
        num_layers=layers,
        decoder_layers=None if decoder_layers == layers else decoder_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=s.take("d_kv", 64),
        hidden=s.take("d_ff", 2048),
        epsilon=s.take("layer_norm_epsilon", 1e-6),
        positions="buckets",
        num_buckets=s.take("relative_attention_num_buckets", 32),
        max_distance=s.take("relative_attention_max_distance", 128),
        activation=activation,
        gated=gated,
        scale=1.0,
        tie_embeddings=tied,
        logit_scale=width**-0.5 if scaled else 1.0,
    )


def _amend(config: TransformerConfig, files: Tensors) -> TransformerConfig:
    """Transformers 5 writes that embeddings are tied whether they are or not."""
    tables = ("lm_head.weight", "shared.weight")
    if not config.tie_embeddings or not {*tables} <= files.names():
        return config
    head, table = map(files.read, tables)
    tied = np.array_equal(head, table)
    return dataclasses.replace(config, tie_embeddings=tied)


def _write(config: TransformerConfig) -> dict[str, Any]:
    names = {"relu": "relu", "silu": "silu", "relu_squared": "relu2"}
    if config.gated:
        names = {"gelu_tanh": _GELU} | {ours: f"gated-{x}" for ours, x in names.items()}
    else:
        names |= {"gelu": "gelu", "gelu_tanh": "gelu_new"}
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.hidden,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers or config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.epsilon,
        "feed_forward_proj": names[config.activation],
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1.0,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    found = [same("encoder/embed/table", "shared.weight")]
    layers = config.num_layers, config.decoder_layers or config.num_layers
    for ours, theirs, count in zip(("encoder/", ""), ("encoder.", "decoder."), layers):
        bias = f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(same(f"{ours}bias/table", bias))
        for i in range(count):
            found += _block(config, f"{ours}blocks/layers_{i}/", f"{theirs}block.{i}.layer.")
        found.append(same(f"{ours}norm/scale", f"{theirs}final_layer_norm.weight"))
    if not config.tie_embeddings:
        found.append(turned("head/kernel", "lm_head.weight"))
    return found


def _block(config: TransformerConfig, ours: str, theirs: str) -> list[Rule]:
    cross = theirs.startswith("decoder.")
    size, mlp = config.num_heads * config.head_dim, 2 if cross else 1

    def fused(path: str, part: str, names: str) -> Rule:
        return joined(path, [f"{part}.{x}.weight" for x in names], [size] * len(names))

    inner, part = f"{ours}attention/inner/", f"{theirs}0.SelfAttention"
    found = [
        fused(f"{inner}qkv/kernel", part, "qkv"),
        turned(f"{inner}out/kernel", f"{part}.o.weight"),
    ]
    found.append(same(f"{ours}attention/norm/scale", f"{theirs}0.layer_norm.weight"))
    if cross:
        inner, part = f"{ours}cross/inner/", f"{theirs}1.EncDecAttention"
        found += [fused(f"{inner}q/kernel", part, "q"), fused(f"{inner}kv/kernel", part, "kv")]
        found.append(turned(f"{inner}out/kernel", f"{part}.o.weight"))
        found.append(same(f"{ours}cross/norm/scale", f"{theirs}1.layer_norm.weight"))
    inner, part = f"{ours}mlp/inner/", f"{theirs}{mlp}.DenseReluDense."
    wide = [f"{part}{x}.weight" for x in (("wi_0", "wi_1") if config.gated else ("wi",))]
    found.append(joined(f"{inner}up/kernel", wide, [config.hidden] * len(wide)))
    found.append(turned(f"{inner}down/kernel", f"{part}wo.weight"))
    found.append(same(f"{ours}mlp/norm/scale", f"{theirs}{mlp}.layer_norm.weight"))
    return found


_TABLES = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
FAMILIES = {
    "t5": Family(
        "t5",
        "T5ForConditionalGeneration",
        EncoderDecoder,
        _read,
        _write,
        _rules,
        example=texts(2),
        prefix="",
        tied=tuple((name, "shared.weight") for name in _TABLES),
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        amend=_amend,
    )
}
