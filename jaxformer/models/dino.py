"""DINOv2: a vision Transformer, and the heads by which a student is taught to agree."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.linear import Dense
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import activations, attention, linear, patch_masks
from jaxformer.typing import Array, Float, Int

_INIT = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class DINOConfig:
    """An encoder and its heads.

    Attributes:
        encoder: With a class token, and a mask token if patches are hidden from it.
        prototypes: Among which a token is sorted, E.
        hidden: Channels of the heads' two hidden layers.
        bottleneck: Channels that are normalised before the prototypes.
        shared: Whether patches have the class token's head, not one of their own.
    """

    encoder: ViTConfig
    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.encoder.class_token:
            raise ValueError("DINO compares class tokens: the encoder needs one.")
        if min(self.prototypes, self.hidden, self.bottleneck) < 1:
            raise ValueError(f"sizes must be positive: {self}.")


class DINOHead(nn.Module):
    """Maps a token to logits of prototypes: its cosine with each of them.

    Attributes:
        prototypes: E.
        hidden: Channels of the two hidden layers.
        bottleneck: Channels of what is compared.

    References:
        Caron et al. 2021, "DINO", section 3.1 and appendix C (the prototypes' norms are fixed at
        1). https://arxiv.org/abs/2104.14294
    """

    prototypes: int
    hidden: int
    bottleneck: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Scores the prototypes; the norms are in float32."""
        for layer in ("first", "second"):
            x = activations.gelu(Dense(self.hidden, True, _INIT, name=layer)(x))
        x = Dense(self.bottleneck, True, _INIT, name="third")(x)
        kernel = self.param("prototypes", _INIT, (self.bottleneck, self.prototypes))
        return _unit(x, axis=-1) @ _unit(kernel, axis=0).astype(x.dtype)


class DINOLogits(NamedTuple):
    """What a view of a batch of images comes to.

    Attributes:
        tokens: Logits of the class tokens.
        patches: Logits of the patches asked for; None if none were.
        features: The class tokens, before any head.
    """

    tokens: Float[Array, "B E"]
    patches: Float[Array, "B M E"] | None
    features: Float[Array, "B D"]


class DINO(nn.Module):
    """An encoder with heads for its class token and for its patches.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps.

    References:
        Oquab et al. 2024, "DINOv2", section 4. https://arxiv.org/abs/2304.07193
    """

    config: DINOConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        config = self.config
        self.encoder = ViT(config.encoder, self.attend, self.project)
        sizes = (config.prototypes, config.hidden, config.bottleneck)
        self.head = DINOHead(*sizes)
        if not config.shared:
            self.patch_head = DINOHead(*sizes)

    def __call__(
        self,
        images: Float[Array, "B *size C"],
        patches: Int[Array, "B M"] | None = None,
        **kwargs: Any,
    ) -> DINOLogits:
        """Scores a view of each image.

        Args:
            images: Of the config's size, or of another that patches divide, as a smaller crop.
            patches: Numbers of the patches to be scored too.
            **kwargs: What `ViT` takes, such as `hidden` and `train`.
        """
        x = self.encode(images, **kwargs)
        scored = None
        if patches is not None:
            chosen = patch_masks.gather_patches(x[:, self.config.encoder.prefix :], patches)
            head = self.head if self.config.shared else self.patch_head
            scored = head(chosen)
        return DINOLogits(self.head(x[:, 0]), scored, x[:, 0])

    def encode(self, images: Float[Array, "B *size C"], **kwargs: Any) -> Float[Array, "B T D"]:
        """What the encoder makes of an image; takes what `ViT` takes."""
        return self.encoder(images, **kwargs)


def _unit(x: Array, axis: int) -> Array:
    x32 = x.astype(jnp.float32)
    squares = jnp.square(x32).sum(axis=axis, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(x.dtype)
