"""What a Transformer costs, by arithmetic on its config: parameters, operations and memory.

Nothing is run, traced or loaded: these are the formulas of a lecture, with D channels, N query and
K key heads of H channels, F hidden channels, V tokens of the vocabulary, T tokens in a text. They
are those of a `Decoder`, and of an `Encoder` that is asked for logits; an `EncoderDecoder`, which
is one of each and cross-attention, has functions of its own.

Operations are those of matrix products, a multiplication and an addition each counting one: 2·I·O
for each vector that goes through I × O weights. What is elementwise (norms, softmax, activations,
rotations) and looking up embeddings, which multiplies nothing, count none.

All raise NotImplementedError, naming it, for a field of the config that is not known here.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxformer.models.transformer import TransformerConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
SLACK = 15  # tokens that a window's cache has room for beyond the window
COUNTED = frozenset(
    """
    vocab_size width num_layers num_heads num_kv_heads head_dim hidden qk_norm dropout layer_scale
    tie_embeddings remat distinct_layers norm order first_norm final_norm positions max_length
    position_offset token_types windows activation gated qkv_bias out_bias mlp_bias head_bias
    softcap sinks embed_norm num_buckets experts
    """.split()  # noqa: SIM905
)
WITHOUT_EFFECT = frozenset(
    """
    drop_path scan epsilon pad_token rope local_rope ahead scale logit_softcap embed_scale
    max_distance logit_scale
    """.split()  # noqa: SIM905
)
_OF_BOTH_HALVES = frozenset(["decoder_layers", "decoder_vocab_size"])
_OF_A_NORM = {"rms": 1, "rms_plus_one": 1, "layer": 2, "layer_without_bias": 1}
_NORMS_OF_A_BLOCK = {"pre": 2, "post": 2, "sandwich": 4, "branch": 2, "parallel": 2}
CHOICES = {
    "norm": _OF_A_NORM,
    "order": _NORMS_OF_A_BLOCK,
    "positions": (
        *("rotary", "learned", "sinusoidal", "sinusoidal_halves", "alibi", "buckets", "none"),
    ),
    "activation": ("gelu", "gelu_tanh", "relu", "relu_squared", "silu", "xielu"),
    "qk_norm": (False, True, "whole"),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A number for each part of a model.

    Attributes:
        embedding: Of tokens and of their kinds, learned positions and biases of distances.
        projections: To queries, keys and values, and from all heads back to the stream.
        scores: Queries times keys, and weights times values.
        mlp: All MLPs, experts and their routers.
        norms: All norms, and learned scales of branches.
        head: From the stream to logits.
    """

    embedding: int = 0
    projections: int = 0
    scores: int = 0
    mlp: int = 0
    norms: int = 0
    head: int = 0

    @property
    def attention(self) -> int:
        """Projections and scores."""
        return self.projections + self.scores

    @property
    def total(self) -> int:
        """All parts."""
        return sum(dataclasses.astuple(self))

    def __mul__(self, factor: int) -> "Parts":
        return Parts(*(factor * part for part in dataclasses.astuple(self)))

    def __add__(self, other: "Parts") -> "Parts":
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Parts(*(one + another for one, another in both))


def check(config: "TransformerConfig", also: frozenset[str] = frozenset()) -> None:
    """Refuses a config that says what is not counted here.

    Raises:
        NotImplementedError: If a field that is not known here has another value than its default,
            or one of several choices that is not known.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in COUNTED | WITHOUT_EFFECT | also:
            known = value in CHOICES.get(field.name, [value])
        else:
            known = value == field.default
        if not known:
            raise NotImplementedError(f"the cost of {field.name}={value!r} is not counted.")


def parameters(config: "TransformerConfig") -> Parts:
    """Counts the numbers that are learned."""
    check(config)
    queries, keys = _channels(config)
    width, layers = config.width, config.distinct_layers or config.num_layers
    of_norm = _OF_A_NORM[config.norm]

    projections = _attention_weights(config)
    projections += (queries + 2 * keys) * config.qkv_bias + width * config.out_bias
    projections += config.num_heads * config.sinks
    norms = of_norm * _NORMS_OF_A_BLOCK[config.order] * width
    if config.qk_norm:
        whole = config.qk_norm == "whole"
        norms += of_norm * (queries + keys if whole else 2 * config.head_dim)
    norms += 2 * width * (config.layer_scale is not None)

    rows = config.vocab_size + config.token_types
    if config.positions == "learned":
        rows += config.max_length + config.position_offset
    biases = config.num_buckets * config.num_heads * (config.positions == "buckets")
    once = config.final_norm + config.embed_norm - (not config.first_norm)
    head = 0 if config.tie_embeddings else config.vocab_size * width
    head += config.vocab_size * config.head_bias
    return Parts(
        embedding=rows * width + biases,
        projections=layers * projections,
        mlp=_mlp_parameters(config, layers),
        norms=layers * norms + once * of_norm * width,
        head=head,
    )


def _mlp_parameters(config: "TransformerConfig", layers: int) -> int:
    """Of all layers: those of the maps, their biases, and what routers and activations learn."""
    wide, experts = _wide(config), config.experts
    bias = (wide + config.width) * config.mlp_bias + 2 * (config.activation == "xielu")
    if experts is None:
        return _mlp_weights(config, layers, 0) + layers * bias
    dense, sparse = _layers(config, layers)
    of_experts = experts.number * (1 + 2 * experts.hidden + config.width) * experts.use_bias
    of_experts += experts.number * (experts.router == "sigmoid")
    all_weights = _mlp_weights(config, layers, experts.number)
    return all_weights + dense * bias + sparse * of_experts


def forward(
    config: "TransformerConfig", length: int, batch: int = 1, *, causal: bool = False
) -> Parts:
    """Counts the operations of the logits of texts.

    Args:
        config: The model's.
        length: T.
        batch: Texts.
        causal: Counts only the pairs of tokens that causality and windows let see each other, as a
            kernel might that skips all others; by default all T² pairs are multiplied, as dense
            attention does.
    """
    check(config)
    if causal:
        pairs = [_seen(length, window) for window in _windows(config)]
    else:
        pairs = [length**2] * config.num_layers
    return _operations(config, batch * length, batch * sum(pairs))


def backward(
    config: "TransformerConfig", length: int, batch: int = 1, *, causal: bool = False
) -> Parts:
    """Counts the operations that gradients of all parameters take after the forward pass.

    Each product has two gradients, one for each of its factors, that cost as much as itself. All
    are needed: the first layer's goes on to the embeddings, where it is added up without products.
    With `remat` each block's forward pass is computed again, save the products that end a branch
    where nothing but the stream reads them.
    """
    products = forward(config, length, batch, causal=causal)
    if not config.remat:
        return products * 2
    again = dataclasses.replace(products, head=0)
    ends = 2 * batch * length * config.width
    if config.order in ("pre", "parallel") and config.layer_scale is None:
        # Of experts the weights read what they say, but nothing reads what all tokens take.
        dense, sparse = _layers(config, config.num_layers)
        hidden = dense * config.hidden
        hidden += sparse * (0 if config.experts is None else config.experts.shared)
        again = dataclasses.replace(again, mlp=again.mlp - ends * hidden)
        if config.order == "parallel":
            last = ends * config.num_layers * _channels(config)[0]
            again = dataclasses.replace(again, projections=again.projections - last)
    return products * 2 + again


def decode(config: "TransformerConfig", context: int, batch: int = 1) -> Parts:
    """Counts the operations of one token more, with a cache.

    Args:
        config: The model's.
        context: Tokens that the cache has room for, the new one among them; all are multiplied,
            written yet or not. A layer with a window has room for 15 more than the window at most.
        batch: Texts.
    """
    check(config)
    return _operations(config, batch, batch * sum(_rooms(config, context)))


def crossover(config: "TransformerConfig") -> float:
    """At how many tokens the scores of attention cost as much as its projections.

    With as many heads for keys as for queries, of D channels in all, 8·T·D² = 4·T²·D: T = 2·D.
    """
    check(config)
    return _attention_weights(config) / (2 * _channels(config)[0])


def cache_bytes(
    config: "TransformerConfig", context: int, batch: int = 1, *, dtype: str = "float32"
) -> int:
    """Bytes of the keys and values of texts; windows keep 15 tokens beyond themselves at most."""
    check(config)
    keys = batch * sum(_rooms(config, context)) * _channels(config)[1]
    return 2 * keys * BYTES[dtype]


def parameter_bytes(config: "TransformerConfig", *, dtype: str = "float32") -> int:
    """Bytes of the parameters alone: those of a model that is not trained."""
    return parameters(config).total * BYTES[dtype]


def training_bytes(config: "TransformerConfig", *, dtype: str = "float32") -> dict[str, int]:
    """Bytes that AdamW needs besides the activations: four numbers for each parameter."""
    each = parameter_bytes(config, dtype=dtype)
    return {"parameters": each, "gradients": each, "moments": 2 * each}


def activation_bytes(
    config: "TransformerConfig", length: int, batch: int = 1, *, dtype: str = "float32"
) -> Parts:
    """Bytes that the backward pass needs of the forward pass of dense attention.

    Counted once each are: both factors of a matrix product, but not its weights; what enters a
    norm, an activation, or a learned scale; the logits; dropout's masks, a byte a number. With
    `remat`, what enters each block, and all that is inside a single one. Not counted are what has
    one number a token, as the norms' roots, and masks of attention.

    This is what has to be kept so that no product is computed twice, not all that JAX keeps: it
    lists 2 to 3 times as much, since a norm or a softmax of several steps keeps more than one
    array. XLA on CPU fuses many of them, and allots 1.4 to 1.7 times as much to a program of layers
    one by one, 1.9 to 2.3 times where layers are scanned, 1.1 to 1.5 times where they are computed
    again besides. Layers that are computed again but not scanned hardly save it memory.
    """
    check(config)
    if config.experts is not None:
        raise NotImplementedError("what experts keep is not counted.")
    tokens, size = batch * length, BYTES[dtype]
    queries, keys = _channels(config)
    width, layers = config.width, config.num_layers
    heads = queries + 2 * keys + queries + (queries + keys) * bool(config.qk_norm)
    maps = 1 + (config.softcap is not None)
    streams = 1 if config.order == "parallel" else _NORMS_OF_A_BLOCK[config.order]
    streams += 2 * (config.layer_scale is not None)
    first = 0 if config.first_norm else size * tokens * width
    masks = 2 * width * tokens * bool(config.dropout)

    block = Parts(
        projections=size * tokens * (width + heads),
        scores=size * maps * batch * config.num_heads * length**2,
        mlp=size * tokens * (width + _wide(config) + config.hidden),
        norms=size * tokens * streams * width + masks,
    )
    if config.remat:
        blocks = block + Parts(norms=size * tokens * (layers - 1) * width)
    else:
        blocks = block * layers
    once = size * tokens * width * (config.final_norm + config.embed_norm)
    return blocks + Parts(norms=once - first, head=size * tokens * (width + config.vocab_size))


def encoder_decoder_parameters(config: "TransformerConfig") -> Parts:
    """Counts what an encoder-decoder learns."""
    first, second = _halves(config)
    queries, keys = _channels(config)
    width, of_norm = config.width, _OF_A_NORM[config.norm]
    cross = _attention_weights(config) + (queries + 2 * keys) * config.qkv_bias
    cross += width * config.out_bias
    norms = of_norm * (_NORMS_OF_A_BLOCK[config.order] // 2 * width)
    norms += of_norm * 2 * config.head_dim * bool(config.qk_norm)
    norms += width * (config.layer_scale is not None)
    layers = second.distinct_layers or second.num_layers
    again = 0 if config.decoder_vocab_size else -config.vocab_size * width  # one table for both
    crossing = Parts(embedding=again, projections=layers * cross, norms=layers * norms)
    return parameters(first) + parameters(second) + crossing


def encoder_decoder_forward(
    config: "TransformerConfig", source: int, target: int, batch: int = 1
) -> Parts:
    """Counts the operations of the logits of targets of T tokens, given sources of S."""
    first, second = _halves(config)
    encoder = dataclasses.replace(forward(first, source, batch), head=0)
    return encoder + forward(second, target, batch) + _cross(second, source, target, batch)


def encoder_decoder_backward(
    config: "TransformerConfig", source: int, target: int, batch: int = 1
) -> Parts:
    """Counts the operations that gradients take after that, as `backward` does."""
    first, second = _halves(config)
    encoder = dataclasses.replace(backward(first, source, batch), head=0)
    cross = _cross(second, source, target, batch) * (3 if config.remat else 2)
    return encoder + backward(second, target, batch) + cross


def _halves(config: "TransformerConfig") -> "tuple[TransformerConfig, TransformerConfig]":
    """The encoder, and the decoder but for its cross-attention, as configs of their own."""
    check(config, _OF_BOTH_HALVES)
    if config.order == "parallel":
        raise NotImplementedError("the cost of order='parallel' with cross-attention is unknown.")
    ended = {"decoder_layers": None, "decoder_vocab_size": None}
    first = dataclasses.replace(config, tie_embeddings=True, head_bias=False, **ended)
    sizes = {"num_layers": config.decoder_layers or config.num_layers, "token_types": 0}
    sizes["vocab_size"] = config.decoder_vocab_size or config.vocab_size
    return first, dataclasses.replace(config, **sizes, **ended)


def _cross(decoder: "TransformerConfig", source: int, target: int, batch: int) -> Parts:
    """Operations of all cross-attention."""
    queries, keys = _channels(decoder)
    layers = batch * decoder.num_layers
    maps = decoder.width * (target * 2 * queries + source * 2 * keys)
    return Parts(projections=2 * layers * maps, scores=4 * layers * target * source * queries)


def _operations(config: "TransformerConfig", tokens: int, pairs: int) -> Parts:
    """Of a number of vectors through all weights, and of pairs of them in all layers."""
    count = 0 if config.experts is None else config.experts.count
    return Parts(
        projections=2 * tokens * config.num_layers * _attention_weights(config),
        scores=4 * pairs * _channels(config)[0],
        mlp=2 * tokens * _mlp_weights(config, config.num_layers, count),
        head=2 * tokens * config.width * config.vocab_size,
    )


def _attention_weights(config: "TransformerConfig") -> int:
    """Of the matrices of attention in one layer."""
    queries, keys = _channels(config)
    return config.width * (queries + 2 * keys) + queries * config.width


def _mlp_weights(config: "TransformerConfig", layers: int, count: int) -> int:
    """Of the matrices of the MLPs of so many layers, or of so many experts and their routers."""
    dense, sparse = _layers(config, layers)
    weights = dense * config.width * (_wide(config) + config.hidden)
    if config.experts is not None:
        hidden = count * config.experts.hidden + config.experts.shared
        weights += sparse * config.width * (config.experts.number + 3 * hidden)
    return weights


def _layers(config: "TransformerConfig", layers: int) -> tuple[int, int]:
    """How many of the layers have an MLP, and how many have experts."""
    dense = layers if config.experts is None else min(config.experts.first, layers)
    return dense, layers - dense


def _channels(config: "TransformerConfig") -> tuple[int, int]:
    """Of all heads together: of queries, and of keys, which are as many as of values."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def _wide(config: "TransformerConfig") -> int:
    """Channels that the first map of the MLP gives."""
    return config.hidden * (2 if config.gated else 1)


def _windows(config: "TransformerConfig") -> tuple[int | None, ...]:
    return config.windows or (None,) * config.num_layers


def _rooms(config: "TransformerConfig", context: int) -> list[int]:
    """Tokens that each layer's cache has room for."""
    return [context if w is None else min(context, w + SLACK) for w in _windows(config)]


def _seen(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees: itself and those before, as far as a window goes."""
    near = length if window is None else min(window, length)
    return near * (near + 1) // 2 + (length - near) * near
