"""What the three skeletons share: their sizes and choices, and the blocks that follow from them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers import stack as stacks
from jaxformer.layers.attention import (
    CrossAttention,
    SelfAttention,
    StackCache,
)
from jaxformer.layers.block import (
    Block,
    BranchNorm,
    Make,
    NoNorm,
    ParallelBlock,
    PostNorm,
    PreNorm,
    SandwichNorm,
)
from jaxformer.layers.experts import Experts
from jaxformer.layers.latent import LatentAttention
from jaxformer.layers.mlp import MLP, XIELU, GatedMLP
from jaxformer.layers.norms import LayerNorm, RMSNorm
from jaxformer.layers.stack import Stack
from jaxformer.ops import activations, linear, positions
from jaxformer.ops import attention as ops_attention
from jaxformer.ops import experts as ops_experts
from jaxformer.ops.rope import GridRope, Rope
from jaxformer.typing import Array, DTypeLike, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "relu": activations.relu,
    "relu_squared": activations.relu_squared,
    "silu": activations.silu,
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "rms_plus_one": functools.partial(RMSNorm, plus_one=True),
    "layer": LayerNorm,
    "layer_without_bias": functools.partial(LayerNorm, use_bias=False),
}
ORDERS: dict[str, Make] = {
    "pre": PreNorm,
    "post": PostNorm,
    "sandwich": SandwichNorm,
    "branch": BranchNorm,
    "parallel": PreNorm,
}
POSITIONS = (
    "rotary",
    "learned",
    "sinusoidal",
    "sinusoidal_halves",  # all sines before all cosines
    "alibi",
    "buckets",  # a learned bias for each distance, the same in all layers, as in T5
    "none",
)
_SLACK = 16  # tokens that may go through a window's cache at once without a copy


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
        number: E.
        count: Experts of a token.
        hidden: F of each.
        router: "softmax" or "sigmoid", as in `ops.experts`.
        unit: "gated" by the config's activation, or "clamped" as in gpt-oss.
        limit: Bound of gates and values of the clamped unit.
        steepness: Of its sigmoid.
        use_bias: Of the experts' maps and the router.
        groups: Of experts, for "sigmoid".
        top_groups: Of which a token may choose.
        normalize: Whether its weights sum to `factor`.
        factor: Of the weights.
        shared: Hidden channels of an MLP that all tokens take besides; 0 for none.
        first: Layers before the first one that has experts.
    """

    number: int
    count: int
    hidden: int
    router: str = "softmax"
    unit: str = "gated"
    limit: float = 7.0
    steepness: float = 1.702
    use_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    factor: float = 1.0
    shared: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.number or self.hidden < 1:
            raise ValueError(f"of E={self.number} experts, count={self.count} cannot be chosen.")
        if self.router not in ("softmax", "sigmoid") or self.unit not in ("gated", "clamped"):
            raise ValueError(f"no such router or unit: {self.router!r}, {self.unit!r}.")
        if self.number % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"E={self.number} experts do not fall into {self.groups} groups.")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latent attention, whose heads have `plain_dim` channels besides the config's H, which turn.

    Attributes:
        rank: Channels of a token's latent.
        query_rank: Channels through which queries are made; None for directly.
        plain_dim: Channels of queries and keys that do not turn.
        value_dim: Of values.
    """

    rank: int
    query_rank: int | None
    plain_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a Transformer; the defaults are those of Llama, with QK-norm at will.

    Attributes:
        vocab_size: V.
        width: D.
        num_layers: Blocks; an encoder-decoder has as many in each half, or `decoder_layers`.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        hidden: F.
        qk_norm: Normalises queries and keys: of each head if True, of all heads together if
            "whole".
        dropout: Share of each branch dropped in training.
        drop_path: Probability of leaving out the last block's branches in training.
        layer_scale: First value of a learned scale of each branch; None for none.
        tie_embeddings: Uses the embedding table for the logits too.
        scan: Scans over the blocks.
        remat: Recomputes each block in the backward pass.
        distinct_layers: Blocks with parameters of their own, each for an equal run of layers;
            `num_layers` if None.
        embed_width: Channels of the embeddings, if not D; a map leads to D.
        norm: One of `NORMS`.
        epsilon: Of all norms.
        order: Where norms stand, one of `ORDERS`; "parallel" also adds both branches to one stream.
        first_norm: Whether the first block normalises what its attention reads.
        final_norm: Whether the stream is normalised after the last block.
        positions: One of `POSITIONS`.
        max_length: Tokens of the longest text to write, whatever the positions, and rows of the
            table of learned ones; 0 for no bound.
        position_offset: Row of that table that the first token takes.
        pad_token: Token that takes the row before that one and is not counted; None for none.
        token_types: Kinds of tokens, such as the first and the second text, each with a learned
            vector; 0 for none.
        rope: How rotary positions turn; by coordinates, for models of images.
        local_rope: The same in layers with a window; None for no difference.
        windows: For each layer how many tokens each may look at, itself and those before, or None
            for all; empty for all in all layers.
        ahead: How many tokens after itself each may look at besides, in layers with a window.
        activation: One of `ACTIVATIONS`, or "xielu".
        gated: Whether one half of the hidden channels gates the other.
        qkv_bias: Of the projections to queries, keys and values.
        key_bias: Whether that to keys has one too.
        out_bias: Of the one after attention.
        mlp_bias: Of the MLP's maps.
        head_bias: Of the logits.
        head_transform: Activation between a map and a norm before the logits, one of
            `ACTIVATIONS`; None for the logits at once.
        pooler: Whether a map of the first token's vector stands for the text.
        scale: Factor of the attention's logits; H**-0.5 if None.
        softcap: Bound of the attention's logits; None for none.
        logit_softcap: Bound of the model's logits; None for none.
        sinks: Whether each head learns the logit of a key without a value.
        embed_scale: Factor of the embeddings.
        embed_norm: Whether they are normalised.
        num_buckets: Of distances, for "buckets".
        max_distance: From which on all distances are one bucket.
        logit_scale: Factor of the logits.
        decoder_layers: Blocks of an encoder-decoder's second half; `num_layers` if None.
        decoder_vocab_size: V of its target, which then has an embedding table of its own; None for
            one table of both.
        experts: A mixture of experts in place of the MLP; None for the MLP.
        latent: Latent attention in place of the other; None for that.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    qk_norm: bool | str = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    tie_embeddings: bool = True
    scan: bool = False
    remat: bool = False
    distinct_layers: int | None = None
    embed_width: int | None = None
    norm: str = "rms"
    epsilon: float = 1e-6
    order: str = "pre"
    first_norm: bool = True
    final_norm: bool = True
    positions: str = "rotary"
    max_length: int = 0
    position_offset: int = 0
    pad_token: int | None = None
    token_types: int = 0
    rope: Rope | GridRope = Rope()
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] = ()
    ahead: int = 0
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    key_bias: bool = True
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    head_transform: str | None = None
    pooler: bool = False
    scale: float | None = None
    softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    logit_scale: float = 1.0
    decoder_layers: int | None = None
    decoder_vocab_size: int | None = None
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"N={self.num_heads} is not a multiple of K={self.num_kv_heads}.")
        if self.positions == "rotary" and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(f"rotary positions need an even head size, got H={self.head_dim}.")
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        choices = {
            "norm": NORMS,
            "order": ORDERS,
            "positions": POSITIONS,
            "activation": (*ACTIVATIONS, "xielu"),
        }
        if self.head_transform is not None:
            choices["head_transform"] = ACTIVATIONS
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {[*known]}, got {getattr(self, name)!r}.")
        if self.activation == "xielu" and self.gated:
            raise ValueError("xielu is no activation of a gated MLP.")
        for name in ("decoder_layers", "decoder_vocab_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}.")
        alone = (self.positions == "buckets", self.decoder_layers, self.latent)
        if self.windows and any(alone):
            raise ValueError(
                'windows go with neither positions="buckets" nor decoder_layers nor latent.'
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers.")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows must be positive or None, got {self.windows}.")
        if self.positions == "learned" and self.max_length < 1:
            raise ValueError(f"learned positions need max_length, got {self.max_length}.")
        if self.positions == "learned" and self.pad_token is not None and self.position_offset < 1:
            raise ValueError(f"{self.pad_token=} needs a row before the first token's.")
        if not self.first_norm and self.order != "pre":
            raise ValueError(f'first_norm=False goes with order="pre" alone, got {self.order!r}.')

    @classmethod
    def tiny(cls, vocab_size: int) -> "TransformerConfig":
        """Two layers of 32 channels, for tests and first steps."""
        return cls(vocab_size, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, hidden=64)

    def make_norm(self) -> Callable[..., nn.Module]:
        """What makes a norm of the config's kind."""
        return functools.partial(NORMS[self.norm], epsilon=self.epsilon)


_ENCODER_DECODER_ALONE = ("decoder_layers", "decoder_vocab_size")
_ENCODER_ALONE = ("pad_token", "token_types", "embed_width", "ahead", "head_transform", "pooler")


def refuse_for_decoder(config: TransformerConfig) -> None:
    """Raises a NotImplementedError that names a choice that encoders alone know."""
    _refuse(config, "a decoder", (*_ENCODER_ALONE, *_ENCODER_DECODER_ALONE))


def refuse_for_encoder(config: TransformerConfig) -> None:
    """Raises a NotImplementedError that names a choice that encoder-decoders alone know."""
    _refuse(config, "an encoder", _ENCODER_DECODER_ALONE)


def refuse_for_encoder_decoder(config: TransformerConfig) -> None:
    """Raises a NotImplementedError that names a choice that encoders alone know."""
    _refuse(config, "an encoder-decoder", _ENCODER_ALONE)


def _refuse(config: TransformerConfig, who: str, names: tuple[str, ...]) -> None:
    for field in dataclasses.fields(TransformerConfig):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise NotImplementedError(f"{who} knows no {field.name}, got {value!r}.")


class Means(NamedTuple):
    """What computes, by functions of the same meaning.

    Attributes:
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps, but of experts and their routers, and of
            those from latents to keys and values.
    """

    attend: Callable[..., Array] = ops_attention.attend
    project: Callable[[Array, Array], Array] = linear.project


_PLAIN = Means()


def stack(config: TransformerConfig, *, cross: bool, name: str, means: Means = _PLAIN) -> Stack:
    """Makes the config's blocks, with cross-attention or without."""
    first = 0 if config.experts is None else config.experts.first
    if len(set(config.windows)) > 1 or not config.first_norm or 0 < first < config.num_layers:
        makers: Any = tuple(
            block(config, layer, cross=cross, means=means) for layer in range(config.num_layers)
        )
    else:
        makers = block(config, 0, cross=cross, means=means)
    return Stack(
        makers,
        config.num_layers,
        scan=config.scan,
        remat=config.remat,
        distinct=config.distinct_layers,
        name=name,
    )


def block(config: TransformerConfig, layer: int, *, cross: bool, means: Means) -> Make:
    """What makes the block of one layer."""
    norm = config.make_norm()
    options = {"norm": norm, "dropout": config.dropout, "drop_path": config.drop_path}
    options["scale_init"] = config.layer_scale
    residual = functools.partial(ORDERS[config.order], **options)
    parts: dict[str, Any] = {
        "attention": attention(config, layer, means),
        "mlp": mlp(config, layer, means),
    }
    parts["residual"] = residual
    if config.order == "parallel":
        return functools.partial(ParallelBlock, **parts)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    qk_norm = norm if config.qk_norm else None
    biases = {"use_bias": config.qkv_bias, "out_bias": config.out_bias}
    more = {"scale": config.scale, **means._asdict()}
    crossing = functools.partial(CrossAttention, *heads, norm=qk_norm, **biases, **more)
    parts["cross"] = crossing if cross else None
    if layer == 0 and not config.first_norm:
        parts["attention_residual"] = functools.partial(NoNorm, **options)
    return functools.partial(Block, **parts)


def attention(config: TransformerConfig, layer: int, means: Means) -> Make:
    """What makes the self-attention of one layer."""
    window = config.windows[layer] if config.windows else None
    rope = config.rope if window is None else config.local_rope or config.rope
    if config.latent is not None:
        return functools.partial(
            LatentAttention,
            config.num_heads,
            config.latent.plain_dim,
            config.head_dim,
            config.latent.value_dim,
            config.latent.rank,
            config.latent.query_rank,
            rotate=rope,
            use_bias=config.out_bias,
            scale=config.scale,
            **means._asdict(),
        )
    alibi = config.positions == "alibi"
    return functools.partial(
        SelfAttention,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        rotate=rope if config.positions == "rotary" else None,
        norm=config.make_norm() if config.qk_norm else None,
        norm_whole=config.qk_norm == "whole",
        use_bias=config.qkv_bias,
        key_bias=config.key_bias,
        out_bias=config.out_bias,
        scale=config.scale,
        softcap=config.softcap,
        sinks=config.sinks,
        slopes=positions.alibi_slope_list(config.num_heads) if alibi else None,
        window=window,
        ahead=config.ahead,
        **means._asdict(),
    )


def mlp(config: TransformerConfig, layer: int, means: Means) -> Make:
    """What makes the MLP of one layer, or its experts."""
    if config.experts is not None and layer >= config.experts.first:
        return _experts(config, config.experts, means)
    if config.activation == "xielu":
        activation: Any = XIELU
    else:
        activation = ACTIVATIONS[config.activation]
    options = {"use_bias": config.mlp_bias, "project": means.project}
    if config.gated:
        unit = functools.partial(_gate, activation)
        return functools.partial(GatedMLP, config.hidden, unit, **options)
    return functools.partial(MLP, config.hidden, activation, **options)


def _experts(config: TransformerConfig, experts: ExpertsConfig, means: Means) -> Make:
    unit: Any = functools.partial(_gate, ACTIVATIONS[config.activation])
    shared = None
    if experts.shared:
        shared = functools.partial(GatedMLP, experts.shared, unit, project=means.project)
    if experts.unit == "clamped":
        unit = functools.partial(
            activations.clamped_swiglu, limit=experts.limit, steepness=experts.steepness
        )
    route: Any = ops_experts.route_softmax
    if experts.router == "sigmoid":
        route = functools.partial(
            ops_experts.route_sigmoid,
            groups=experts.groups,
            top_groups=experts.top_groups,
            normalize=experts.normalize,
            factor=experts.factor,
        )
    return functools.partial(
        Experts,
        experts.number,
        experts.count,
        experts.hidden,
        unit,
        use_bias=experts.use_bias,
        correct=experts.router == "sigmoid",
        route=route,
        shared=shared,
    )


def _gate(activation: Callable[[Array], Array], gate: Array, value: Array) -> Array:
    return activation(gate) * value


def refuse_beyond(config: TransformerConfig, length: int, what: str) -> None:
    """Raises a ValueError that names `what` is of more tokens than the config's `max_length`."""
    if 0 < config.max_length < length:
        kind = "learned " if config.positions == "learned" else ""
        raise ValueError(f"{what} exceeds the {config.max_length} {kind}positions.")


def last_of_each(x: Float[Array, "B T D"], counts: Int[Array, "B"] | None) -> Float[Array, "B 1 D"]:
    """Takes what stands at each row's last real token; without counts, at the last of all."""
    if counts is None:
        return x[:, -1:]
    return jnp.take_along_axis(x, counts[:, None, None] - 1, axis=1)


def empty_cache(
    config: TransformerConfig,
    batch: int,
    max_length: int,
    dtype: DTypeLike,
    *,
    by_row: bool = False,
) -> StackCache:
    """Makes a cache for `batch` rows of up to `max_length` tokens in all of the config's blocks.

    A layer whose window is no longer than that keeps its window and a few tokens. With `by_row` the
    rows grow each by itself.
    """
    windows = config.windows or (None,) * config.num_layers
    rooms = [w + _SLACK - 1 if w is not None and w <= max_length else max_length for w in windows]
    sizes, value_dim = (batch, config.num_kv_heads, rooms, config.head_dim), None
    if config.latent is not None:
        sizes, value_dim = (batch, 1, rooms, config.latent.rank + config.head_dim), 0
    return stacks.empty_cache(
        config.num_layers, config.scan, *sizes, dtype, value_dim=value_dim, by_row=by_row
    )


def max_rewind(config: TransformerConfig, max_length: int) -> int | None:
    """Counts the tokens that such a cache can forget; None for all, where no window's rolls."""
    rolls = any(window is not None and window <= max_length for window in config.windows)
    return _SLACK - 1 if rolls else None
