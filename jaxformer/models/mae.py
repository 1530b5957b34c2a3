"""A masked autoencoder: it sees a quarter of an image's patches and paints the others."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.models.predictor import Predictor, PredictorConfig, check_size
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import attention, linear, patch_masks
from jaxformer.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    """An encoder of seen patches and the decoder of all.

    Attributes:
        encoder: A ViT without a head.
        decoder: Narrower and of fewer layers, whose outputs are a patch's pixels.
    """

    encoder: ViTConfig
    decoder: PredictorConfig

    def __post_init__(self) -> None:
        pixels = math.prod(self.encoder.patch) * self.encoder.channels
        if self.decoder.outputs != pixels:
            raise ValueError(f"a patch has {pixels} numbers, got outputs={self.decoder.outputs}.")

    @classmethod
    def of(
        cls, encoder: ViTConfig, width: int, num_layers: int, num_heads: int, **choices: Any
    ) -> "MAEConfig":
        """Takes an encoder and the sizes of a decoder with four times as many hidden channels."""
        pixels = math.prod(encoder.patch) * encoder.channels
        decoder = PredictorConfig(width, num_layers, num_heads, 4 * width, pixels, **choices)
        return cls(encoder, decoder)


class MAE(nn.Module):
    """Encodes the kept patches alone, and predicts the pixels of every patch.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps.

    References:
        He et al. 2022, "Masked autoencoders are scalable vision learners".
        https://arxiv.org/abs/2111.06377
    """

    config: MAEConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        means = (self.attend, self.project)
        self.encoder = ViT(self.config.encoder, *means)
        self.decoder = Predictor(self.config.decoder, self.config.encoder, *means)

    def __call__(
        self,
        images: Float[Array, "B *size C"],
        keep: Int[Array, "B K"],
        hide: Int[Array, "B M"],
        *,
        train: bool = False,
    ) -> Float[Array, "B P channels"]:
        """Predicts the pixels of patches, as `patchify` orders them.

        Args:
            images: Of the config's size.
            keep: Numbers of the patches that the encoder sees.
            hide: Numbers of all others.
            train: Drops; needs an rng named "dropout" if there is anything to drop.

        Raises:
            ValueError: If the images have more patches than the decoder knows places for.
        """
        check_size(self.config.encoder, images)
        seen = self.encoder(images, keep=keep, train=train)
        told = self.decoder(seen, keep, hide, train=train)
        order = jnp.argsort(jnp.concatenate([keep, hide], axis=1), axis=1)
        return patch_masks.gather_patches(told, order)

    def encode(self, images: Float[Array, "B *size C"], **kwargs: Any) -> Float[Array, "B T D"]:
        """What the encoder makes of an image; takes what `ViT` takes."""
        return self.encoder(images, **kwargs)
