"""What a decoder costs, by arithmetic on its config: parameters, operations and memory.

Nothing is run, traced or loaded: these are the formulas of a lecture, with D channels, N query and
K key heads of H channels, F hidden channels, V tokens of the vocabulary, T tokens in a text.

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
    tie_embeddings remat norm order final_norm positions max_length position_offset windows
    activation gated qkv_bias out_bias mlp_bias head_bias softcap sinks embed_norm
    """.split()  # noqa: SIM905
)
WITHOUT_EFFECT = frozenset(
    """
    drop_path scan epsilon rope local_rope scale logit_softcap embed_scale logit_scale
    """.split()  # noqa: SIM905
)
_OF_A_NORM = {"rms": 1, "rms_plus_one": 1, "layer": 2, "layer_without_bias": 1}
_NORMS_OF_A_BLOCK = {"pre": 2, "post": 2, "sandwich": 4, "branch": 2, "parallel": 2}
CHOICES = {
    "norm": _OF_A_NORM,
    "order": _NORMS_OF_A_BLOCK,
    "positions": ("rotary", "learned", "sinusoidal", "alibi", "none"),
    "activation": ("gelu", "gelu_tanh", "relu", "relu_squared", "silu", "xielu"),
    "qk_norm": (False, True, "whole"),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A number for each part of a model.

    Attributes:
        embedding: Of tokens and learned positions.
        projections: To queries, keys and values, and from all heads back to the stream.
        scores: Queries times keys, and weights times values.
        mlp: All MLPs.
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


def check(config: "TransformerConfig") -> None:
    """Refuses a config that says what is not counted here.

    Raises:
        NotImplementedError: If a field that is not known here has another value than its default,
            or one of several choices that is not known.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in COUNTED | WITHOUT_EFFECT:
            known = value in CHOICES.get(field.name, [value])
        else:
            known = value == field.default
        if not known:
            raise NotImplementedError(f"the cost of {field.name}={value!r} is not counted.")
    if config.head_bias and config.tie_embeddings:
        raise NotImplementedError("the cost of head_bias=True with tied embeddings is not counted.")


def parameters(config: "TransformerConfig") -> Parts:
    """Counts the numbers that are learned."""
    check(config)
    queries, keys = _channels(config)
    width, wide = config.width, _wide(config)
    of_norm = _OF_A_NORM[config.norm]

    projections, mlp = _weights(config)
    projections += (queries + 2 * keys) * config.qkv_bias + width * config.out_bias
    projections += config.num_heads * config.sinks
    mlp += (wide + width) * config.mlp_bias + 2 * (config.activation == "xielu")
    norms = of_norm * _NORMS_OF_A_BLOCK[config.order] * width
    if config.qk_norm:
        whole = config.qk_norm == "whole"
        norms += of_norm * (queries + keys if whole else 2 * config.head_dim)
    norms += 2 * width * (config.layer_scale is not None)

    rows = config.vocab_size
    if config.positions == "learned":
        rows += config.max_length + config.position_offset
    once = of_norm * width * (config.final_norm + config.embed_norm)
    head = 0 if config.tie_embeddings else config.vocab_size * (width + config.head_bias)
    block = Parts(projections=projections, mlp=mlp, norms=norms)
    return block * config.num_layers + Parts(embedding=rows * width, norms=once, head=head)


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
    last = 2 * batch * length * config.num_layers * config.width
    if config.order in ("pre", "parallel") and config.layer_scale is None:
        again = dataclasses.replace(again, mlp=again.mlp - last * config.hidden)
        if config.order == "parallel":
            projections = again.projections - last * _channels(config)[0]
            again = dataclasses.replace(again, projections=projections)
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
    keys = 0
    for window, room in zip(_windows(config), _rooms(config, context)):
        beside = window is not None and room < window  # the new key is not in the cache yet
        keys += room + beside
    return _operations(config, batch, batch * keys)


def crossover(config: "TransformerConfig") -> float:
    """At how many tokens the scores of attention cost as much as its projections.

    With as many heads for keys as for queries, of D channels in all, 8·T·D² = 4·T²·D: T = 2·D.
    """
    check(config)
    return _weights(config)[0] / (2 * _channels(config)[0])


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
    array, and XLA on CPU, which fuses many of them, allots 1.4 to 1.7 times as much to a program
    of layers one by one, 1.9 to 2.3 times where layers are scanned. There it also computes nothing
    twice for `remat` unless they are scanned.
    """
    check(config)
    tokens, size = batch * length, BYTES[dtype]
    queries, keys = _channels(config)
    width, layers = config.width, config.num_layers
    heads = queries + 2 * keys + queries + (queries + keys) * bool(config.qk_norm)
    maps = 1 + (config.softcap is not None)
    streams = 1 if config.order == "parallel" else _NORMS_OF_A_BLOCK[config.order]
    streams += 2 * (config.layer_scale is not None)
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
    return blocks + Parts(norms=once, head=size * tokens * (width + config.vocab_size))


def _operations(config: "TransformerConfig", tokens: int, pairs: int) -> Parts:
    """Of a number of vectors through all weights, and of pairs of them in all layers."""
    projections, mlp = _weights(config)
    return Parts(
        projections=2 * tokens * config.num_layers * projections,
        scores=4 * pairs * _channels(config)[0],
        mlp=2 * tokens * config.num_layers * mlp,
        head=2 * tokens * config.width * config.vocab_size,
    )


def _weights(config: "TransformerConfig") -> tuple[int, int]:
    """Of the matrices of one layer: in attention, and in the MLP."""
    queries, keys = _channels(config)
    attention = config.width * (queries + 2 * keys) + queries * config.width
    return attention, config.width * _wide(config) + config.hidden * config.width


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
