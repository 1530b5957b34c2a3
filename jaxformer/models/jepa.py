"""A joint-embedding predictive architecture: it predicts the vectors of hidden patches."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jaxformer.models.predictor import Predictor, PredictorConfig, check_size
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import Mask
from jaxformer.ops.rope import GridRope
from jaxformer.typing import Array, Float, Int

_VIDEO_ROPE = GridRope(theta=10_000.0, unit=1.0, interleaved=True)


@dataclasses.dataclass(frozen=True)
class JEPAConfig:
    """An encoder and a predictor.

    Attributes:
        encoder: A ViT without a head; of images, or of clips.
        predictor: Narrower, whose outputs are the encoder's D.
    """

    encoder: ViTConfig
    predictor: PredictorConfig

    def __post_init__(self) -> None:
        if self.predictor.outputs != self.encoder.width:
            raise ValueError(
                f"the encoder has D={self.encoder.width}, got outputs={self.predictor.outputs}."
            )

    @classmethod
    def of(
        cls, encoder: ViTConfig, width: int, num_layers: int, num_heads: int, **choices: Any
    ) -> "JEPAConfig":
        """Takes an encoder and the sizes of a predictor with four times as many hidden channels."""
        sizes = (width, num_layers, num_heads, 4 * width, encoder.width)
        return cls(encoder, PredictorConfig(*sizes, **choices))

    @classmethod
    def v_jepa_2(cls, width: int, num_layers: int, num_heads: int, hidden: int) -> "JEPAConfig":
        """V-JEPA 2 in some size: 64 frames of 256×256, in tubes of 2×16×16, and its predictor."""
        rotary: dict[str, Any] = {"class_token": False, "pool": "mean", "positions": "rotary"}
        sizes = (width, num_layers, num_heads, hidden)
        encoder = ViTConfig((64, 256, 256), (2, 16, 16), 3, *sizes, rope=_VIDEO_ROPE, **rotary)
        return cls.of(encoder, 384, 12, 12, positions="rotary", mask_tokens=10)


class JEPA(nn.Module):
    """Encodes what is seen of an image, and predicts the vectors of what is not.

    The vectors to be predicted are those that another encoder, whose parameters follow this one's
    slowly, makes of the whole image, each normalised:

        wanted = model.apply(teacher, images, method="encode")[:, config.encoder.prefix :]
        wanted = patch_masks.gather_patches(norms.layer_norm(wanted), targets)
        told = model.apply(params, images, keep, targets)

    The targets of one row see each other: I-JEPA gives each of its blocks a row.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps.

    References:
        Assran et al. 2023, "Self-supervised learning from images with a joint-embedding predictive
        architecture". https://arxiv.org/abs/2301.08243
        Assran et al. 2025, "V-JEPA 2". https://arxiv.org/abs/2506.09985
    """

    config: JEPAConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        means = (self.attend, self.project)
        self.encoder = ViT(self.config.encoder, *means)
        self.predictor = Predictor(self.config.predictor, self.config.encoder, *means)

    def __call__(
        self,
        images: Float[Array, "B *size C"],
        keep: Int[Array, "B K"],
        targets: Int[Array, "B M"],
        *,
        train: bool = False,
    ) -> Float[Array, "B M D"]:
        """Predicts the vectors of the targets from the kept patches alone.

        Neither may be filled up with P: where rows have more or fewer, call `encode` and `predict`
        with masks that leave out the rest.

        Raises:
            ValueError: If the images have more patches than the predictor knows places for.
        """
        check_size(self.config.encoder, images)
        seen = self.encode(images, keep=keep, train=train)
        return self.predict(seen, keep, targets, train=train)

    def encode(
        self, images: Float[Array, "B *size C"], mask: Mask | None = None, **kwargs: Any
    ) -> Float[Array, "B T D"]:
        """What the encoder makes of an image; takes what `ViT` takes."""
        return self.encoder(images, mask, **kwargs)

    def predict(
        self,
        seen: Float[Array, "B K1 D"],
        keep: Int[Array, "B K"],
        targets: Int[Array, "B M"],
        mask: Mask | None = None,
        **kwargs: Any,
    ) -> Float[Array, "B M D"]:
        """Predicts the vectors of the targets; takes what `Predictor` takes."""
        return self.predictor(seen, keep, targets, mask, **kwargs)[:, keep.shape[1] :]
