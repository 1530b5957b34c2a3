"""What the three skeletons share: their sizes and choices, and the blocks that follow from them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jaxformer.layers import stack as stacks
from jaxformer.layers.attention import CrossAttention, SelfAttention, StackCache
from jaxformer.layers.block import (
    Block,
    BranchNorm,
    Make,
    ParallelBlock,
    PostNorm,
    PreNorm,
    SandwichNorm,
)
from jaxformer.layers.mlp import MLP, XIELU, GatedMLP
from jaxformer.layers.norms import LayerNorm, RMSNorm
from jaxformer.layers.stack import Stack
from jaxformer.ops import activations, positions
from jaxformer.ops.rope import Rope
from jaxformer.typing import Array, DTypeLike

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
POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
_SLACK = 16  # tokens that may go through a window's cache at once without a copy


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a Transformer; the defaults are those of Llama, with QK-norm at will.

    Attributes:
        vocab_size: V.
        width: D.
        num_layers: Blocks; an encoder-decoder has as many in each half.
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
        norm: One of `NORMS`.
        epsilon: Of all norms; None for what each kind has.
        order: Where norms stand, one of `ORDERS`; "parallel" also adds both branches to one stream.
        final_norm: Whether the stream is normalised after the last block.
        positions: One of `POSITIONS`.
        max_length: Rows of the table of learned positions; 0 for no bound.
        position_offset: Row of that table that the first token takes.
        rope: How rotary positions turn.
        local_rope: The same in layers with a window; None for no difference.
        windows: For each layer how many tokens each may look at, itself and those before, or None
            for all; empty for all in all layers.
        activation: One of `ACTIVATIONS`, or "xielu".
        gated: Whether one half of the hidden channels gates the other.
        qkv_bias: Of the projections to queries, keys and values.
        out_bias: Of the one after attention.
        mlp_bias: Of the MLP's maps.
        head_bias: Of the logits.
        scale: Factor of the attention's logits; H**-0.5 if None.
        softcap: Bound of the attention's logits; None for none.
        logit_softcap: Bound of the model's logits; None for none.
        sinks: Whether each head learns the logit of a key without a value.
        embed_scale: Factor of the embeddings.
        embed_norm: Whether they are normalised.
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
    norm: str = "rms"
    epsilon: float | None = None
    order: str = "pre"
    final_norm: bool = True
    positions: str = "rotary"
    max_length: int = 0
    position_offset: int = 0
    rope: Rope = Rope()
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] = ()
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False

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
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {[*known]}, got {getattr(self, name)!r}.")
        if self.activation == "xielu" and self.gated:
            raise ValueError("xielu is no activation of a gated MLP.")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers.")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows must be positive or None, got {self.windows}.")
        if self.positions == "learned" and self.max_length < 1:
            raise ValueError(f"learned positions need max_length, got {self.max_length}.")

    @classmethod
    def tiny(cls, vocab_size: int) -> "TransformerConfig":
        """Two layers of 32 channels, for tests and first steps."""
        return cls(vocab_size, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, hidden=64)

    def make_norm(self) -> Callable[..., nn.Module]:
        """What makes a norm of the config's kind."""
        made = NORMS[self.norm]
        return made if self.epsilon is None else functools.partial(made, epsilon=self.epsilon)


def stack(config: TransformerConfig, *, cross: bool, name: str) -> Stack:
    """Makes the config's blocks, with cross-attention or without."""
    if len(set(config.windows)) > 1:
        makers: Any = tuple(block(config, layer, cross=cross) for layer in range(config.num_layers))
    else:
        makers = block(config, 0, cross=cross)
    return Stack(makers, config.num_layers, scan=config.scan, remat=config.remat, name=name)


def block(config: TransformerConfig, layer: int, *, cross: bool) -> Make:
    """What makes the block of one layer."""
    norm = config.make_norm()
    residual = functools.partial(
        ORDERS[config.order],
        norm=norm,
        dropout=config.dropout,
        drop_path=config.drop_path,
        scale_init=config.layer_scale,
    )
    parts = {"attention": attention(config, layer), "mlp": mlp(config), "residual": residual}
    if config.order == "parallel":
        return functools.partial(ParallelBlock, **parts)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    qk_norm = norm if config.qk_norm else None
    crossing = functools.partial(CrossAttention, *heads, norm=qk_norm, use_bias=config.qkv_bias)
    return functools.partial(Block, **parts, cross=crossing if cross else None)


def attention(config: TransformerConfig, layer: int) -> Make:
    """What makes the self-attention of one layer."""
    window = config.windows[layer] if config.windows else None
    rope = config.rope if window is None else config.local_rope or config.rope
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
        out_bias=config.out_bias,
        scale=config.scale,
        softcap=config.softcap,
        sinks=config.sinks,
        slopes=positions.alibi_slope_list(config.num_heads) if alibi else None,
        window=window,
    )


def mlp(config: TransformerConfig) -> Make:
    """What makes the MLP of a block."""
    if config.activation == "xielu":
        activation: Any = XIELU
    else:
        activation = ACTIVATIONS[config.activation]
    if config.gated:
        unit = functools.partial(_gate, activation)
        return functools.partial(GatedMLP, config.hidden, unit, use_bias=config.mlp_bias)
    return functools.partial(MLP, config.hidden, activation, use_bias=config.mlp_bias)


def _gate(activation: Callable[[Array], Array], gate: Array, value: Array) -> Array:
    return activation(gate) * value


def empty_cache(
    config: TransformerConfig,
    batch: int,
    max_length: int,
    dtype: DTypeLike,
    *,
    by_row: bool = False,
) -> StackCache:
    """Makes a cache for `batch` rows of up to `max_length` tokens in all of the config's blocks.

    A layer with a window keeps no more than its window and a few tokens. With `by_row` the rows
    grow each by itself.
    """
    windows = config.windows or (None,) * config.num_layers
    rooms = [max_length if w is None else min(max_length, w + _SLACK - 1) for w in windows]
    sizes = (batch, config.num_kv_heads, rooms, config.head_dim)
    return stacks.empty_cache(config.num_layers, config.scan, *sizes, dtype, by_row=by_row)
