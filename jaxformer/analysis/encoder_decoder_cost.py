"""What an `EncoderDecoder` costs: its halves as `analysis.cost` counts them, and what joins them.

A source has S tokens, a target T. The first half is an encoder without logits; the second is a
decoder whose blocks have cross-attention besides: the target's vectors go through the maps to
queries and from all heads back to the stream, the source's through those to keys and values.
"""

import dataclasses
from typing import TYPE_CHECKING

from jaxformer.analysis import block_cost, cost
from jaxformer.analysis.cost import Parts

if TYPE_CHECKING:
    from jaxformer.models.transformer import TransformerConfig

_OF_BOTH_HALVES = frozenset(["decoder_layers", "decoder_vocab_size"])
_OF_ENCODERS = ("token_types", "head_transform")


def parameters(config: "TransformerConfig") -> Parts:
    """Counts the numbers that are learned."""
    first, second = _halves(config)
    queries, keys = block_cost.channels(config)
    width, of_norm = config.width, block_cost.OF_A_NORM[config.norm]
    cross = 2 * width * (queries + keys) + (queries + 2 * keys) * config.qkv_bias
    cross += width * config.out_bias
    norms = of_norm * cost.NORMS_OF_A_BLOCK[config.order] // 2 * width
    norms += of_norm * 2 * config.head_dim * bool(config.qk_norm)
    norms += width * (config.layer_scale is not None)
    layers = second.distinct_layers or second.num_layers
    again = 0 if config.decoder_vocab_size else -config.vocab_size * width  # one table for both
    crossing = Parts(embedding=again, projections=layers * cross, norms=layers * norms)
    return cost.parameters(first) + cost.parameters(second) + crossing


def forward(config: "TransformerConfig", source: int, target: int, batch: int = 1) -> Parts:
    """Counts the operations of the logits of targets of T tokens, given sources of S."""
    _, second = _halves(config)
    return (
        begin(config, source, batch)
        + cost.forward(second, target, batch)
        + _asked(second, source, target, batch)
    )


def backward(config: "TransformerConfig", source: int, target: int, batch: int = 1) -> Parts:
    """Counts the operations that gradients take after that, as `cost.backward` does."""
    first, second = _halves(config)
    encoder = dataclasses.replace(cost.backward(first, source, batch), head=0)
    cross = _told(second, source, batch) + _asked(second, source, target, batch)
    return encoder + cost.backward(second, target, batch) + cross * (3 if config.remat else 2)


def begin(config: "TransformerConfig", source: int, batch: int = 1) -> Parts:
    """Counts the operations of reading sources: encoding, and the keys and values of each block."""
    first, second = _halves(config)
    encoder = dataclasses.replace(cost.forward(first, source, batch), head=0)
    return encoder + _told(second, source, batch)


def step(config: "TransformerConfig", source: int, context: int, batch: int = 1) -> Parts:
    """Counts the operations of one token more of the targets, with the cache from `begin`.

    Args:
        config: The model's.
        source: S.
        context: Tokens of a target that the cache has room for, as for `cost.decode`.
        batch: Targets.
    """
    _, second = _halves(config)
    return cost.decode(second, context, batch) + _asked(second, source, 1, batch)


def cache_bytes(
    config: "TransformerConfig",
    source: int,
    context: int,
    batch: int = 1,
    *,
    dtype: str = "float32",
) -> int:
    """Bytes of the keys and values of targets, as `cost.cache_bytes` has them, and of sources."""
    _, second = _halves(config)
    of_sources = 2 * batch * source * second.num_layers * block_cost.channels(config)[1]
    return cost.cache_bytes(second, context, batch, dtype=dtype) + of_sources * cost.BYTES[dtype]


def activation_bytes(
    config: "TransformerConfig",
    source: int,
    target: int,
    batch: int = 1,
    *,
    dtype: str = "float32",
) -> Parts:
    """Bytes that the backward pass needs of the forward pass, as `cost.activation_bytes` has them.

    With `remat` all that is inside the largest block is counted for each half.
    """
    first, second = _halves(config)
    size, width = cost.BYTES[dtype], config.width
    sources, targets = batch * source, batch * target
    queries, keys = block_cost.channels(config)
    normed = 1 + bool(config.qk_norm)
    streams = cost.NORMS_OF_A_BLOCK[config.order] // 2 + (config.layer_scale is not None)

    encoder = cost.activation_bytes(first, source, batch, dtype=dtype)
    context = Parts(projections=size * sources * width)  # read by all blocks, in place of a head
    cross = Parts(
        projections=size * targets * (width + queries * (1 + normed))
        + size * sources * keys * (1 + normed),
        scores=size * batch * config.num_heads * target * source,
        norms=targets * width * (size * streams + bool(config.dropout)),
    )
    decoder = cost.activation_bytes(second, target, batch, dtype=dtype)
    decoder += cross * (1 if config.remat else second.num_layers)
    return dataclasses.replace(encoder, head=0) + context + decoder


def _halves(config: "TransformerConfig") -> "tuple[TransformerConfig, TransformerConfig]":
    """The encoder, and the decoder but for its cross-attention, as configs of their own."""
    cost.check(config, _OF_BOTH_HALVES)
    if config.order == "parallel":
        raise NotImplementedError("the cost of order='parallel' with cross-attention is unknown.")
    for name in _OF_ENCODERS:
        if getattr(config, name):
            raise NotImplementedError(f"an encoder-decoder knows no {name}.")
    ended = {"decoder_layers": None, "decoder_vocab_size": None}
    first = dataclasses.replace(config, tie_embeddings=True, head_bias=False, **ended)
    sizes = {"num_layers": config.decoder_layers or config.num_layers}
    sizes["vocab_size"] = config.decoder_vocab_size or config.vocab_size
    return first, dataclasses.replace(config, **sizes, **ended)


def _told(decoder: "TransformerConfig", source: int, batch: int) -> Parts:
    """Operations of the keys and values of sources, in all blocks."""
    _, keys = block_cost.channels(decoder)
    return Parts(projections=4 * batch * source * decoder.num_layers * decoder.width * keys)


def _asked(decoder: "TransformerConfig", source: int, target: int, batch: int) -> Parts:
    """Operations of all else in cross-attention."""
    queries, _ = block_cost.channels(decoder)
    each = 4 * batch * target * decoder.num_layers * queries
    return Parts(projections=each * decoder.width, scores=each * source)
