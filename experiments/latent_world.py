"""A world model of vectors: what it sees becomes vectors, and what comes next is told in them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.linear import Dense
from jaxformer.models.transformer import TransformerConfig, stack
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import attention
from jaxformer.typing import Array, Float, PyTree


@dataclasses.dataclass(frozen=True)
class LatentWorldConfig:
    """Sizes of a LatentWorld.

    Attributes:
        side: Height and width of a frame in pixels.
        patch: Side in pixels of what the ViT reads as one token.
        vector: D, numbers that stand for a frame.
        width: Channels of the two Transformers.
        num_layers: Blocks of each.
        num_heads: N, of each.
    """

    side: int = 16
    patch: int = 4
    vector: int = 16
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        if self.vector < 1:
            raise ValueError(f"vector must be positive, got D={self.vector}.")
        self.eyes()
        self.trunk()

    def eyes(self) -> ViTConfig:
        """Sizes of the ViT."""
        frame, patch = (self.side, self.side), (self.patch, self.patch)
        sizes = (1, self.width, self.num_layers, self.num_heads, 2 * self.width)
        return ViTConfig(frame, patch, *sizes, class_token=False, pool="mean")

    def trunk(self) -> TransformerConfig:
        """Sizes of the Transformer over time."""
        heads = (self.num_heads, self.num_heads, self.width // self.num_heads)
        sizes = (1, self.width, self.num_layers, *heads, 2 * self.width)
        return TransformerConfig(*sizes, qk_norm=True)


class LatentWorld(nn.Module):
    """A vector for each frame by a ViT, and the next one by a causal Transformer over the last.

    Attributes:
        config: Sizes.
    """

    config: LatentWorldConfig

    def setup(self) -> None:
        config = self.config
        self.eyes = ViT(config.eyes())
        self.vector = Dense(config.vector, use_bias=True)
        self.into = Dense(config.width, use_bias=True)
        self.blocks = stack(config.trunk(), cross=False, name="blocks")
        self.norm = config.trunk().make_norm()()
        start = nn.initializers.normal(0.02)  # so that it first tells what it saw, or nearly
        self.change = Dense(config.vector, use_bias=True, kernel_init=start)

    def __call__(self, frames: Float[Array, "B T h w 1"]) -> Float[Array, "B D"]:
        """Tells the vector of the frame that follows."""
        return self.predict(self.encode(frames))

    def encode(self, frames: Float[Array, "B T h w 1"]) -> Float[Array, "B T D"]:
        """Turns each frame into a vector, by itself."""
        seen = self.eyes.pooled(frames.reshape(-1, *frames.shape[2:]))
        return self.vector(seen).reshape(*frames.shape[:2], -1)

    def predict(self, vectors: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Tells the next vector: the last one and a change."""
        x = self.blocks(self.into(vectors), attention.causal())
        return vectors[:, -1] + self.change(self.norm(x[:, -1]))


@functools.partial(jax.jit, static_argnums=0)
def encode(
    model: LatentWorld, params: PyTree, frames: Float[Array, "B T h w 1"]
) -> Float[Array, "B T D"]:
    """Turns each frame into a vector."""
    vectors: Any = model.apply(params, frames, method="encode")
    return vectors


@functools.partial(jax.jit, static_argnums=(0, 3))
def dream(
    model: LatentWorld, params: PyTree, vectors: Float[Array, "B T D"], count: int
) -> Float[Array, "B {count} D"]:
    """Goes on for `count` steps, each told from the T vectors before it and no frame."""

    def advance(window: Array, _: None) -> tuple[Array, Array]:
        told: Any = model.apply(params, window, method="predict")
        return jnp.concatenate([window[:, 1:], told[:, None]], axis=1), told

    return jax.lax.scan(advance, vectors, length=count)[1].swapaxes(0, 1)
