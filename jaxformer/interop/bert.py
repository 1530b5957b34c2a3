"""BERT, RoBERTa and ALBERT: norms after each branch, learned positions, kinds of tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxformer.interop.families import Family
from jaxformer.interop.llama import ACTIVATIONS, WRITTEN
from jaxformer.interop.rules import Rule, joined, same, turned
from jaxformer.interop.settings import Settings
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import TransformerConfig

# Of earlier versions, and what only other heads or writing text would read.
_IDLE = (
    "directionality",
    "do_sample",
    "eos_token_ids",
    "layers_to_keep",
    "length_penalty",
    "max_length",
    "num_beams",
    "num_memory_blocks",
    "num_return_sequences",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)


@dataclasses.dataclass(frozen=True)
class Names:
    """What an encoder of this lineage calls its tensors.

    Attributes:
        model: What all names start with but those of the head.
        layer: Of a layer, with a place for its number.
        maps: Our maps of a layer, by theirs: one name, or those of queries, keys and values.
        norms: Our norms of a layer, by theirs.
        others: Our other maps, norms and tables, by theirs.
        head: The output map of a head whose weights are not tied.
        bias: Its bias.
        tied_bias: The same where weights are tied.
    """

    model: str
    layer: str
    maps: Mapping[str, str | tuple[str, ...]]
    norms: Mapping[str, str]
    others: Mapping[str, str]
    head: str
    bias: str
    tied_bias: str


def _qkv(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in ("query", "key", "value"))


BERT_MAPS = {
    "attention/inner/qkv": _qkv("attention.self"),
    "attention/inner/out": "attention.output.dense",
    "mlp/inner/up": "intermediate.dense",
    "mlp/inner/down": "output.dense",
}
_TABLES = {
    "embed": "embeddings.word_embeddings",
    "places": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm_in": "embeddings.LayerNorm",
}
ROBERTA_HEAD = {"transform": "lm_head.dense", "norm_out": "lm_head.layer_norm"}
_BERT = Names(
    "bert.",
    "encoder.layer.{}.",
    BERT_MAPS,
    {"attention/norm": "attention.output.LayerNorm", "mlp/norm": "output.LayerNorm"},
    _TABLES
    | {
        "pool": "pooler.dense",
        "transform": "cls.predictions.transform.dense",
        "norm_out": "cls.predictions.transform.LayerNorm",
    },
    "cls.predictions.decoder",
    "cls.predictions.decoder.bias",
    "cls.predictions.bias",
)
_ROBERTA = dataclasses.replace(
    _BERT,
    model="roberta.",
    others=_TABLES | {"pool": "pooler.dense"} | ROBERTA_HEAD,
    head="lm_head.decoder",
    bias="lm_head.decoder.bias",
    tied_bias="lm_head.bias",
)
_ALBERT = Names(
    "albert.",
    "encoder.albert_layer_groups.{}.albert_layers.0.",
    {
        "attention/inner/qkv": _qkv("attention"),
        "attention/inner/out": "attention.dense",
        "mlp/inner/up": "ffn",
        "mlp/inner/down": "ffn_output",
    },
    {"attention/norm": "attention.LayerNorm", "mlp/norm": "full_layer_layer_norm"},
    _TABLES
    | {
        "widen": "encoder.embedding_hidden_mapping_in",
        "pool": "pooler",
        "transform": "predictions.dense",
        "norm_out": "predictions.LayerNorm",
    },
    "predictions.decoder",
    "predictions.decoder.bias",
    "predictions.bias",
)
_NAMES = {"bert": _BERT, "roberta": _ROBERTA, "albert": _ALBERT}
_CLASSES = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert"}


def heads(s: Settings, name: str, *, pooler: bool = True) -> dict[str, Any]:
    """Which heads the class of a checkpoint has: those of masked words, or a pooler at most.

    Args:
        s: The settings.
        name: What the names of the classes start with.
        pooler: Whether the class without a head pools.

    Raises:
        ValueError: If it is a class that is not known.
    """
    classes = s.take("architectures", [f"{name}ForMaskedLM"])
    known = [f"{name}ForMaskedLM", f"{name}ForPreTraining", f"{name}Model"]
    if len(classes) != 1 or classes[0] not in known:
        raise ValueError(f"{s.where}: architectures={classes} is not supported; {known} are.")
    tied = s.take("tie_word_embeddings", True)
    if classes[0] == known[2]:
        return {"pooler": pooler}
    return {"head_transform": "gelu", "head_bias": True, "tie_embeddings": tied}


def written_heads(config: TransformerConfig, name: str) -> dict[str, Any]:
    """The way back."""
    kind = "Model" if config.head_transform is None else "ForMaskedLM"
    return {"architectures": [f"{name}{kind}"], "tie_word_embeddings": config.tie_embeddings}


def method(config: TransformerConfig) -> str:
    """What makes all parameters when it is initialised."""
    return (
        "logits" if config.head_transform is not None else "pooled" if config.pooler else "__call__"
    )


def sizes(s: Settings, *, epsilon: float = 1e-12) -> dict[str, Any]:
    """What all of them say alike."""
    width, count = s.take("hidden_size"), s.take("num_attention_heads")
    if width % count:
        raise ValueError(f"{s.where}: hidden_size={width} is no multiple of N={count}.")
    s.only("is_decoder", False)
    return {
        "vocab_size": s.take("vocab_size"),
        "width": width,
        "num_layers": s.take("num_hidden_layers"),
        "num_heads": count,
        "num_kv_heads": count,
        "head_dim": width // count,
        "hidden": s.take("intermediate_size"),
        "epsilon": s.take("layer_norm_eps", epsilon),
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }


def written_sizes(config: TransformerConfig) -> dict[str, Any]:
    """The way back."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.epsilon,
        "max_position_embeddings": config.max_length + config.position_offset,
    }


def _read(model_type: str, s: Settings) -> TransformerConfig:
    found = heads(s, _CLASSES[model_type]) | sizes(s)
    act = s.choice("hidden_act", ACTIVATIONS, "gelu_new" if model_type == "albert" else "gelu")
    rows = s.take("max_position_embeddings", 512)
    found |= {"positions": "learned", "max_length": rows, "activation": act}
    found |= {"order": "post", "final_norm": False, "embed_norm": True}
    found["token_types"] = s.take("type_vocab_size", 2)
    if "head_transform" in found and model_type != "roberta":
        found["head_transform"] = act
    if model_type == "roberta":
        pad = s.take("pad_token_id", 1)
        found |= {"pad_token": pad, "position_offset": pad + 1, "max_length": rows - pad - 1}
    if model_type == "albert":
        s.only("inner_group_num", 1)
        for name, value in (("gap_size", 0), ("net_structure_type", 0), ("down_scale_factor", 1)):
            s.only(name, value)
        found["embed_width"] = s.take("embedding_size", 128)
        found["distinct_layers"] = s.take("num_hidden_groups", 1)
    s.only("position_embedding_type", "absolute")
    for name in _IDLE:
        s.take(name, None)
    return TransformerConfig(**found)


def _write(model_type: str, config: TransformerConfig) -> dict[str, Any]:
    found = written_heads(config, _CLASSES[model_type]) | written_sizes(config)
    found |= {"hidden_act": WRITTEN[config.activation], "type_vocab_size": config.token_types}
    if model_type == "roberta":
        found["pad_token_id"] = config.pad_token
    if model_type == "albert":
        found["embedding_size"] = config.embed_width
        found["num_hidden_groups"] = config.distinct_layers
    return found


def rules(names: Names, config: TransformerConfig) -> list[Rule]:
    """The tensors of an encoder of this lineage."""

    def affine(ours: str, theirs: str, weight: str) -> list[Rule]:
        weights = turned if weight == "kernel" else same
        found = [weights(f"{ours}/{weight}", f"{theirs}.weight")]
        return found if weight == "table" else [*found, same(f"{ours}/bias", f"{theirs}.bias")]

    there = {
        "places": config.positions == "learned",
        "types": bool(config.token_types),
        "norm_in": config.embed_norm,
        "widen": config.embed_width is not None,
        "norm": config.final_norm,
        "pool": config.pooler,
        "transform": config.head_transform is not None,
        "norm_out": config.head_transform is not None,
    }
    kinds = {"embed": "table", "places": "table", "types": "table"}
    kinds |= dict.fromkeys(("norm_in", "norm", "norm_out"), "scale")
    found = []
    for ours, theirs in names.others.items():
        if there.get(ours, True):
            of_head = ours in ("transform", "norm_out")
            theirs = theirs if of_head else names.model + theirs
            found += affine(ours, theirs, kinds.get(ours, "kernel"))
    outputs = [config.num_heads * config.head_dim] * 3
    for i in range(config.distinct_layers or config.num_layers):
        ours, theirs = f"blocks/layers_{i}/", names.model + names.layer.format(i)
        for a, b in names.maps.items():
            if isinstance(b, str):
                found += affine(ours + a, theirs + b, "kernel")
                continue
            for x, y in (("kernel", "weight"), ("bias", "bias")):
                found.append(joined(f"{ours}{a}/{x}", [f"{theirs}{c}.{y}" for c in b], outputs))
        for a, b in names.norms.items():
            found += affine(ours + a, theirs + b, "scale")
    if not config.tie_embeddings:
        found.append(turned("head/kernel", f"{names.head}.weight"))
        found.append(same("head/bias", names.bias))
    elif config.head_bias:
        found.append(same("head_bias", names.tied_bias))
    return found


def tied(names: Names) -> tuple[tuple[str, str], ...]:
    """What a checkpoint may have twice."""
    table = names.model + _TABLES["embed"] + ".weight"
    return (f"{names.head}.weight", table), (names.bias, names.tied_bias)


OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_UNUSED = (
    r".*embeddings\.position_ids",
    r"(bert|roberta|albert)\.pooler\..*",  # beside a head for masked words
    r"cls\.seq_relationship\..*",
    r"sop_classifier\..*",
    r"(cls\.predictions|predictions|lm_head)\.bias",  # where the output map has its own
)
FAMILIES = {
    name: Family(
        name,
        f"{_CLASSES[name]}ForMaskedLM",
        Encoder,
        functools.partial(_read, name),
        functools.partial(_write, name),
        functools.partial(rules, _NAMES[name]),
        prefix=_NAMES[name].model,
        tied=tied(_NAMES[name]),
        unused=_UNUSED,
        method=method,
        renamed=OLD_NAMES,
    )
    for name in _CLASSES
}
