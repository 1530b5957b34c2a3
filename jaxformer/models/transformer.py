"""What the three skeletons share: their sizes, and the block that follows from them."""

import dataclasses
import functools

from jaxformer.layers import stack as stacks
from jaxformer.layers.attention import CrossAttention, SelfAttention, StackCache
from jaxformer.layers.block import Block, PreNorm
from jaxformer.layers.mlp import GatedMLP
from jaxformer.layers.norms import RMSNorm
from jaxformer.layers.stack import Stack
from jaxformer.ops import rotary
from jaxformer.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer with rotary positions, RMSNorm before each branch, and SwiGLU.

    Attributes:
        vocab_size: V.
        width: D.
        num_layers: Blocks; an encoder-decoder has as many in each half.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        hidden: F.
        theta: Base of the rotary wavelengths, in tokens.
        qk_norm: Normalises queries and keys.
        dropout: Share of each branch dropped in training.
        drop_path: Probability of leaving out the last block's branches in training.
        layer_scale: First value of a learned scale of each branch; None for none.
        tie_embeddings: Uses the embedding table for the logits too.
        scan: Scans over the blocks.
        remat: Recomputes each block in the backward pass.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    theta: float = 10_000.0
    qk_norm: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    tie_embeddings: bool = True
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"N={self.num_heads} is not a multiple of K={self.num_kv_heads}.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got H={self.head_dim}.")
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")

    @classmethod
    def tiny(cls, vocab_size: int) -> "TransformerConfig":
        """Two layers of 32 channels, for tests and first steps."""
        return cls(vocab_size, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, hidden=64)


def stack(config: TransformerConfig, *, cross: bool, name: str) -> Stack:
    """Makes the config's blocks, with cross-attention or without."""
    norm = RMSNorm if config.qk_norm else None
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    rotate = functools.partial(rotary.rotate, theta=config.theta)
    block = functools.partial(
        Block,
        attention=functools.partial(SelfAttention, *heads, rotate=rotate, norm=norm),
        mlp=functools.partial(GatedMLP, config.hidden),
        cross=functools.partial(CrossAttention, *heads, norm=norm) if cross else None,
        residual=functools.partial(
            PreNorm,
            dropout=config.dropout,
            drop_path=config.drop_path,
            scale_init=config.layer_scale,
        ),
    )
    return Stack(block, config.num_layers, scan=config.scan, remat=config.remat, name=name)


def empty_cache(
    config: TransformerConfig, batch: int, max_length: int, dtype: DTypeLike
) -> StackCache:
    """Makes a cache for `batch` rows of up to `max_length` tokens in all of the config's blocks."""
    heads, channels = config.num_kv_heads, config.head_dim
    return stacks.empty_cache(
        config.num_layers, config.scan, batch, heads, max_length, channels, dtype
    )
