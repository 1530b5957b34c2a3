"""What the parts of one block have, and do for a token: the terms that `analysis.cost` adds up.

Weights are those of matrices, through each of which goes a token's vector once; `learned` are
these and all other numbers that are learned, but for those of norms.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig

OF_A_NORM = {"rms": 1, "rms_plus_one": 1, "layer": 2, "layer_without_bias": 1}  # for each channel


@dataclasses.dataclass(frozen=True)
class Attention:
    """Self-attention.

    Attributes:
        weights: That a token goes through, with a cache or without.
        learned: Numbers.
        norms: Numbers that its own norms learn.
        last: Weights of the last map.
        pair: Channels multiplied for a query and a key, and for a weight and a value, of all heads.
        cached_pair: The same where keys and values come from a cache.
        cached: Numbers of a token in the cache.
        kept: Numbers of a token for the backward pass, besides the stream.
        maps: Numbers of a query and a key for it, for each head.
    """

    weights: int
    learned: int
    norms: int
    last: int
    pair: int
    cached_pair: int
    cached: int
    kept: int
    maps: int = 1


@dataclasses.dataclass(frozen=True)
class MLP:
    """An MLP, or experts with their router.

    Attributes:
        weights: That a token goes through.
        learned: Numbers.
        last: Weights of the last map, if nothing but the stream reads what it says.
        kept: Numbers of a token for the backward pass, besides the stream.
        router: As many more in float32 whatever the dtype: the router's logits.
    """

    weights: int
    learned: int
    last: int
    kept: int
    router: int = 0


def attention(config: "TransformerConfig") -> Attention:
    """That of every layer, of the kind that the config says."""
    if config.latent is not None:
        return _latent(config, config.latent)
    queries, keys = channels(config)
    weights = config.width * (queries + 2 * keys) + queries * config.width
    biases = (queries + keys + keys * config.key_bias) * config.qkv_bias
    biases += config.width * config.out_bias
    normed = queries + keys if config.qk_norm == "whole" else 2 * config.head_dim
    return Attention(
        weights=weights,
        learned=weights + biases + config.num_heads * config.sinks,
        norms=OF_A_NORM[config.norm] * normed * bool(config.qk_norm),
        last=queries * config.width,
        pair=2 * queries,
        cached_pair=2 * queries,
        cached=2 * keys,
        kept=2 * (queries + keys) + (queries + keys) * bool(config.qk_norm),
        maps=1 + (config.softcap is not None),
    )


def _latent(config: "TransformerConfig", latent: "LatentConfig") -> Attention:
    """With a cache two maps move to queries and results, and pairs multiply latents themselves."""
    width, rank, turning = config.width, latent.rank, config.head_dim
    queries = config.num_heads * (latent.plain_dim + turning)
    values = config.num_heads * latent.value_dim
    through = latent.query_rank or 0
    weights = width * through + (through or width) * queries
    weights += width * (rank + turning)
    weights += rank * (config.num_heads * latent.plain_dim + values) + values * width
    return Attention(
        weights=weights,
        learned=weights + (through + rank + turning + width) * config.out_bias,
        norms=through + rank,
        last=values * width,
        pair=queries + values,
        cached_pair=config.num_heads * (2 * rank + turning),
        cached=rank + turning,
        kept=2 * through + 2 * rank + 2 * queries + 2 * values,
    )


def mlps(config: "TransformerConfig", layers: int) -> list[MLP]:
    """That of each of so many layers, of which the first may have none of the config's experts."""
    if config.experts is None:
        return [_dense(config)] * layers
    first = min(config.experts.first, layers)
    return [_dense(config)] * first + [_experts(config, config.experts)] * (layers - first)


def _dense(config: "TransformerConfig") -> MLP:
    wide = config.hidden * (2 if config.gated else 1)
    weights = config.width * (wide + config.hidden)
    more = (wide + config.width) * config.mlp_bias + 2 * (config.activation == "xielu")
    return MLP(weights, weights + more, config.width * config.hidden, wide + config.hidden)


def _experts(config: "TransformerConfig", experts: "ExpertsConfig") -> MLP:
    """What the shared one says is read by the stream alone; the others' by their weights too."""
    width, number, count, shared = config.width, experts.number, experts.count, experts.shared
    biases = number * (1 + 2 * experts.hidden + width) * experts.use_bias
    biases += number * (experts.router == "sigmoid")
    return MLP(
        weights=width * (number + 3 * (count * experts.hidden + shared)),
        learned=width * (number + 3 * (number * experts.hidden + shared)) + biases,
        last=width * shared,
        kept=count * (width + 3 * experts.hidden + width) + 3 * shared,
        router=number,
    )


def channels(config: "TransformerConfig") -> tuple[int, int]:
    """Of all heads together: of queries, and of keys, which are as many as of values."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
