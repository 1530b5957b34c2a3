"""ESM-1b and ESM-2: BERT with norms before each branch, rotary or learned positions, contacts."""

from typing import Any

from jaxformer.interop import bert
from jaxformer.interop.families import Family
from jaxformer.interop.rules import Rule, same, turned
from jaxformer.interop.settings import Settings
from jaxformer.models.esm import ESM, ESMConfig
from jaxformer.ops.rope import Rope

_NAMES = bert.Names(
    "esm.",
    "encoder.layer.{}.",
    bert.BERT_MAPS,
    {"attention/norm": "attention.LayerNorm", "mlp/norm": "LayerNorm"},
    {
        "embed": "embeddings.word_embeddings",
        "places": "embeddings.position_embeddings",
        "norm_in": "embeddings.layer_norm",
        "norm": "encoder.emb_layer_norm_after",
        "pool": "pooler.dense",
    }
    | bert.ROBERTA_HEAD,
    "lm_head.decoder",
    "lm_head.bias",
    "lm_head.bias",
)


def _read(s: Settings) -> ESMConfig:
    found = bert.heads(s, "Esm") | bert.sizes(s)
    pad, mask = s.take("pad_token_id"), s.take("mask_token_id", None)
    rows = s.take("max_position_embeddings", 1026)
    found |= {"activation": "gelu", "pad_token": pad, "max_length": rows}
    found["embed_norm"] = s.take("emb_layer_norm_before", False)
    theta = float(s.take("rope_theta", 10_000.0))
    if s.only("position_embedding_type", "absolute", "rotary") == "rotary":
        found["rope"] = Rope(theta)
    else:
        found |= {"positions": "learned", "position_offset": pad + 1, "max_length": rows - pad - 1}
    if s.take("token_dropout", False):
        if mask is None:
            raise ValueError(f"{s.where}: token_dropout needs mask_token_id.")
        found["mask_token"] = mask
    s.only("is_folding_model", False)
    s.only("esmfold_config", None)
    s.only("hidden_act", "gelu")
    s.take("vocab_list", None)
    return ESMConfig(**found)


def _write(config: ESMConfig) -> dict[str, Any]:
    found = bert.written_heads(config, "Esm") | bert.written_sizes(config)
    return found | {
        "pad_token_id": config.pad_token,
        "mask_token_id": config.mask_token,
        "token_dropout": config.mask_token is not None,
        "emb_layer_norm_before": config.embed_norm,
        "position_embedding_type": "rotary" if config.positions == "rotary" else "absolute",
        "rope_theta": config.rope.theta,
    }


def _rules(config: ESMConfig) -> list[Rule]:
    found = bert.rules(_NAMES, config)
    found.append(turned("contact/kernel", "esm.contact_head.regression.weight"))
    found.append(same("contact/bias", "esm.contact_head.regression.bias"))
    return found


FAMILIES = {
    "esm": Family(
        "esm",
        "EsmForMaskedLM",
        ESM,
        _read,
        _write,
        _rules,
        prefix="esm.",
        tied=(("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),),
        unused=(
            r".*embeddings\.position_ids",
            r".*rotary_embeddings\.inv_freq",
            r"esm\.embeddings\.position_embeddings\.weight",  # beside rotary positions
            r"esm\.pooler\..*",  # beside a head for masked residues
        ),
        method=bert.method,
        renamed=bert.OLD_NAMES,
    )
}
