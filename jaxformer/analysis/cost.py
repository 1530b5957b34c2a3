"""What a Transformer costs, by arithmetic on its config: parameters, operations and memory.

Nothing is run, traced or loaded: these are the formulas of a lecture, with D channels, N query and
K key heads of H channels, F hidden channels, V tokens of the vocabulary, T tokens in a text. They
are those of a `Decoder`, and of an `Encoder` that is asked for logits; `encoder_decoder_cost` has
those of an `EncoderDecoder`, which is one of each and cross-attention, `vision_cost` of a `ViT`.

Operations are those of matrix products, a multiplication and an addition each counting one: 2·I·O
for each vector that goes through I × O weights. What is elementwise (norms, softmax, activations,
rotations) and looking up embeddings, which multiplies nothing, count none.

All raise NotImplementedError, naming it, for a field of the config that is not known here.
"""

import dataclasses
from typing import TYPE_CHECKING

from jaxformer.analysis import block_cost

if TYPE_CHECKING:
    from jaxformer.models.transformer import TransformerConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
SLACK = 15  # tokens that a window's cache has room for beyond the window
COUNTED = frozenset(
    """
    vocab_size width num_layers num_heads num_kv_heads head_dim hidden qk_norm dropout layer_scale
    tie_embeddings remat distinct_layers norm order first_norm final_norm positions max_length
    position_offset token_types windows activation gated qkv_bias key_bias out_bias mlp_bias
    head_bias head_transform softcap sinks embed_norm num_buckets experts latent
    """.split()  # noqa: SIM905
)
WITHOUT_EFFECT = frozenset(
    """
    drop_path scan epsilon pad_token rope local_rope ahead scale logit_softcap embed_scale
    max_distance logit_scale
    """.split()  # noqa: SIM905
)
NORMS_OF_A_BLOCK = {"pre": 2, "post": 2, "sandwich": 4, "branch": 2, "parallel": 2}
CHOICES = {
    "norm": block_cost.OF_A_NORM,
    "order": NORMS_OF_A_BLOCK,
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
        head: From the stream to logits, and what an encoder has before them.
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
    width, layers = config.width, config.distinct_layers or config.num_layers
    attention, of_norm = block_cost.attention(config), block_cost.OF_A_NORM[config.norm]
    norms = of_norm * NORMS_OF_A_BLOCK[config.order] * width + attention.norms
    norms += 2 * width * (config.layer_scale is not None)

    rows = config.vocab_size + config.token_types
    if config.positions == "learned":
        rows += config.max_length + config.position_offset
    biases = config.num_buckets * config.num_heads * (config.positions == "buckets")
    transforms = config.head_transform is not None
    once = config.final_norm + config.embed_norm - (not config.first_norm) + transforms
    head = 0 if config.tie_embeddings else config.vocab_size * width
    head += config.vocab_size * config.head_bias
    head += transforms * (width + config.mlp_bias) * width
    return Parts(
        embedding=rows * width + biases,
        projections=layers * attention.learned,
        mlp=sum(mlp.learned for mlp in block_cost.mlps(config, layers)),
        norms=layers * norms + once * of_norm * width,
        head=head,
    )


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
    channels = block_cost.attention(config).pair
    return _operations(config, batch * length, batch * sum(pairs) * channels)


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
    if config.order in ("pre", "parallel") and config.layer_scale is None:
        tokens, layers = batch * length, config.num_layers
        last = sum(mlp.last for mlp in block_cost.mlps(config, layers))
        again += Parts(mlp=-2 * tokens * last)
        if config.order == "parallel":
            again += Parts(projections=-2 * tokens * layers * block_cost.attention(config).last)
    return products * 2 + again


def decode(config: "TransformerConfig", context: int, batch: int = 1) -> Parts:
    """Counts the operations of one token more, with a cache.

    Args:
        config: The model's.
        context: Tokens that the cache has room for, the new one among them; all are multiplied,
            written yet or not. A layer whose window is no longer keeps the window and 15 more.
        batch: Texts.
    """
    check(config)
    channels = block_cost.attention(config).cached_pair
    return _operations(config, batch, batch * sum(_rooms(config, context)) * channels)


def crossover(config: "TransformerConfig") -> float:
    """At how many tokens the scores of attention cost as much as its projections.

    With as many heads for keys as for queries, of D channels in all, 8·T·D² = 4·T²·D: T = 2·D.
    """
    check(config)
    attention = block_cost.attention(config)
    return attention.weights / attention.pair


def cache_bytes(
    config: "TransformerConfig", context: int, batch: int = 1, *, dtype: str = "float32"
) -> int:
    """Bytes of the keys and values of texts, or of latents in their place.

    A layer whose window is no longer than the context keeps the window and 15 tokens more.
    """
    check(config)
    tokens = batch * sum(_rooms(config, context))
    return tokens * block_cost.attention(config).cached * BYTES[dtype]


def adamw_bytes(number: int, *, dtype: str = "float32") -> dict[str, int]:
    """Bytes that AdamW needs of so many parameters: four numbers for each, and no activations."""
    each = number * BYTES[dtype]
    return {"parameters": each, "gradients": each, "moments": 2 * each}


def activation_bytes(
    config: "TransformerConfig", length: int, batch: int = 1, *, dtype: str = "float32"
) -> Parts:
    """Bytes that the backward pass needs of the forward pass of dense attention.

    Counted once each are: both factors of a matrix product, but not its weights; what enters a
    norm, an activation, a learned scale, or the weighted sum of experts; the logits, also those of
    routers, in float32; dropout's masks, a byte a number. With `remat`, what enters each block, and
    all that is inside the largest one. Not counted are what has one number a token, as the norms'
    roots, and masks of attention.

    This is what has to be kept so that no product is computed twice, not all that JAX keeps: it
    lists 2 to 3 times as much, since a norm or a softmax of several steps keeps more than one
    array. XLA on CPU fuses many of them, and allots 1.4 to 1.7 times as much to a program of layers
    one by one, 1.9 to 2.3 times where layers are scanned, 1.1 to 1.5 times where they are computed
    again besides. Layers that are computed again but not scanned hardly save it memory. To experts
    it allots more there, as each gets room for all rows: 3 times as much for 8, 8 for 32.
    """
    check(config)
    tokens, size = batch * length, BYTES[dtype]
    width, layers = config.width, config.num_layers
    attention = block_cost.attention(config)
    streams = 1 if config.order == "parallel" else NORMS_OF_A_BLOCK[config.order]
    streams += 2 * (config.layer_scale is not None)
    masks = 2 * width * tokens * bool(config.dropout)

    block = Parts(
        projections=size * tokens * (width + attention.kept),
        scores=size * attention.maps * batch * config.num_heads * length**2,
        norms=size * tokens * streams * width + masks,
    )
    router = BYTES["float32"]
    mlps = [
        tokens * (size * (width + mlp.kept) + router * mlp.router)
        for mlp in block_cost.mlps(config, layers)
    ]
    if config.remat:
        blocks = block + Parts(mlp=max(mlps), norms=size * tokens * (layers - 1) * width)
    else:
        blocks = block * layers + Parts(mlp=sum(mlps))
    transforms = config.head_transform is not None
    once = config.final_norm + config.embed_norm - (not config.first_norm) + transforms
    head = width + 2 * transforms * width + config.vocab_size
    return blocks + Parts(norms=size * tokens * width * once, head=size * tokens * head)


def _operations(config: "TransformerConfig", tokens: int, products: int) -> Parts:
    """Of a number of vectors through all weights, and of all products of pairs of them."""
    layers, transforms = config.num_layers, config.head_transform is not None
    return Parts(
        projections=2 * tokens * layers * block_cost.attention(config).weights,
        scores=2 * products,
        mlp=2 * tokens * sum(mlp.weights for mlp in block_cost.mlps(config, layers)),
        head=2 * tokens * config.width * (config.vocab_size + transforms * config.width),
    )


def _windows(config: "TransformerConfig") -> tuple[int | None, ...]:
    return config.windows or (None,) * config.num_layers


def _rooms(config: "TransformerConfig", context: int) -> list[int]:
    """Tokens that each layer's cache has room for."""
    return [context if w is None or w > context else w + SLACK for w in _windows(config)]


def _seen(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees: itself and those before, as far as a window goes."""
    near = length if window is None else min(window, length)
    return near * (near + 1) // 2 + (length - near) * near
