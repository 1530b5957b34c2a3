"""ModernBERT: rotary positions, local and global layers by turns, gated MLPs, no biases."""

from typing import Any

from jaxformer.interop import bert
from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, same, turned
from jaxformer.interop.settings import Settings, write_rope
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops.rope import Rope

_KINDS = ("full_attention", "sliding_attention")
_IDLE = (
    "classifier_pooling",
    "deterministic_flash_attn",
    "embedding_dropout",
    "initializer_cutoff_factor",
    "layer_norm_eps",
    "mlp_dropout",
    "position_embedding_type",
    "reference_compile",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",
)


def _read(s: Settings) -> TransformerConfig:
    found = bert.heads(s, "ModernBert", pooler=False)
    width, heads = s.take("hidden_size"), s.take("num_attention_heads")
    if width % heads:
        raise ValueError(f"{s.where}: hidden_size={width} is no multiple of N={heads}.")
    layers, every = s.take("num_hidden_layers"), s.take("global_attn_every_n_layers", 3)
    kinds = s.take("layer_types", None) or [_KINDS[i % every != 0] for i in range(layers)]
    if {*kinds} - {*_KINDS} or len(kinds) != layers:
        raise ValueError(f"{s.where}: layer_types={kinds!r} is not supported for {layers} layers.")
    ahead = s.take("local_attention", 128) // 2
    windows = tuple(ahead + 1 if kind == _KINDS[1] else None for kind in kinds)
    rope, local_rope = _ropes(s)
    bias, out_bias = s.take("attention_bias", False), s.take("mlp_bias", False)
    classifier_bias = s.take("classifier_bias", False)
    if classifier_bias != out_bias and "head_transform" in found:
        raise ValueError(
            f"{s.where}: {classifier_bias=} is not supported, where mlp_bias={out_bias}."
        )
    act = s.choice("classifier_activation", ACTIVATIONS, "gelu")
    if "head_transform" in found:
        found |= {"head_transform": act, "head_bias": s.take("decoder_bias", True)}
    s.take("decoder_bias", None)
    for name in _IDLE:
        s.take(name, None)
    return TransformerConfig(
        vocab_size=s.take("vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden=s.take("intermediate_size"),
        max_length=s.take("max_position_embeddings", 8192),
        norm="layer" if s.take("norm_bias", False) else "layer_without_bias",
        epsilon=s.take("norm_eps", 1e-5),
        first_norm=False,
        embed_norm=True,
        rope=rope,
        local_rope=local_rope,
        windows=windows if any(windows) else (),
        ahead=ahead if any(windows) else 0,
        activation=s.choice("hidden_activation", ACTIVATIONS, "gelu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=out_bias,
        **found,
    )


def _ropes(s: Settings) -> tuple[Rope, Rope]:
    """Of layers without a window and with one."""
    thetas = s.take("global_rope_theta", 160_000.0), s.take("local_rope_theta", 10_000.0)
    given = s.take("rope_parameters", None) or {}
    if {*given} - {*_KINDS}:
        raise ValueError(f"{s.where}: rope_parameters={given!r} are not supported.")
    by_kind = {
        kind: {"rope_theta": theta} | (given.get(kind) or {}) for kind, theta in zip(_KINDS, thetas)
    }
    inner = {"rope_parameters": by_kind, "max_position_embeddings": s.max_length}
    ropes = Settings(inner, s.where).rope()
    return ropes[_KINDS[0]], ropes[_KINDS[1]]


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert config.local_rope is not None
    windows = config.windows or (None,) * config.num_layers
    found = bert.written_heads(config, "ModernBert")
    found["layer_types"] = [_KINDS[window is not None] for window in windows]
    if config.ahead:
        found["local_attention"] = 2 * config.ahead
    if config.head_transform is not None:
        found["classifier_activation"] = WRITTEN[config.head_transform]
        found |= {"classifier_bias": config.mlp_bias, "decoder_bias": config.head_bias}
    # The ids that transformers takes for granted may lie outside the vocabulary.
    found |= dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))
    ropes = (config.rope, config.local_rope)
    return found | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "norm_bias": config.norm == "layer",
        "norm_eps": config.epsilon,
        "hidden_activation": WRITTEN[config.activation],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": {
            kind: write_rope(rope, config.max_length) for kind, rope in zip(_KINDS, ropes)
        },
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    def norm(ours: str, theirs: str) -> list[Rule]:
        bias = [same(f"{ours}/bias", f"{theirs}.bias")] * (config.norm == "layer")
        return [same(f"{ours}/scale", f"{theirs}.weight"), *bias]

    def linear(ours: str, theirs: str, bias: bool) -> list[Rule]:
        found = [turned(f"{ours}/kernel", f"{theirs}.weight")]
        return found + [same(f"{ours}/bias", f"{theirs}.bias")] * bias

    found = [same("embed/table", "model.embeddings.tok_embeddings.weight")]
    found += norm("norm_in", "model.embeddings.norm") + norm("norm", "model.final_norm")
    for i in range(config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", f"model.layers.{i}."
        # Queries, keys and values lie there as they do here, and so do the halves of the MLP.
        found += linear(f"{ours}attention/inner/qkv", f"{theirs}attn.Wqkv", config.qkv_bias)
        found += linear(f"{ours}attention/inner/out", f"{theirs}attn.Wo", config.out_bias)
        found += linear(f"{ours}mlp/inner/up", f"{theirs}mlp.Wi", config.mlp_bias)
        found += linear(f"{ours}mlp/inner/down", f"{theirs}mlp.Wo", config.mlp_bias)
        found += norm(f"{ours}attention/norm", f"{theirs}attn_norm") * (i > 0)
        found += norm(f"{ours}mlp/norm", f"{theirs}mlp_norm")
    if config.head_transform is not None:
        found += linear("transform", "head.dense", config.mlp_bias) + norm("norm_out", "head.norm")
    if not config.tie_embeddings:
        found += linear("head", "decoder", config.head_bias)
    elif config.head_bias:
        found.append(same("head_bias", "decoder.bias"))
    return found


FAMILIES = {
    "modernbert": Family(
        "modernbert",
        "ModernBertForMaskedLM",
        Encoder,
        _read,
        _write,
        _rules,
        prefix="model.",
        tied=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
        unused=(r".*rotary_emb\..*inv_freq",),
        method=bert.method,
    )
}
