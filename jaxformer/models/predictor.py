"""A narrow Transformer that tells what stands at hidden patches from the vectors of the seen."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.embed import GridPositions
from jaxformer.layers.linear import Dense
from jaxformer.models.transformer import Means, TransformerConfig, stack
from jaxformer.models.vit import ViTConfig
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Float, Int

POSITIONS = ("sinusoidal", "learned", "rotary")
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """Sizes of a predictor; the other choices are its encoder's.

    Attributes:
        width: D of its own.
        num_layers: Blocks.
        num_heads: N.
        hidden: F.
        outputs: Numbers told of each patch.
        positions: One of `POSITIONS`.
        mask_tokens: Learned vectors that stand for a hidden patch, one of which is chosen.
    """

    width: int
    num_layers: int
    num_heads: int
    hidden: int
    outputs: int
    positions: str = "sinusoidal"
    mask_tokens: int = 1

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}.")
        if self.width % self.num_heads:
            raise ValueError(f"D={self.width} is not a multiple of N={self.num_heads}.")
        if min(self.outputs, self.mask_tokens) < 1:
            raise ValueError(f"outputs and mask_tokens must be positive: {self}.")

    def trunk(self, encoder: ViTConfig) -> TransformerConfig:
        """What the blocks are made of."""
        return dataclasses.replace(
            encoder.trunk(),
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            hidden=self.hidden,
            positions="rotary" if self.positions == "rotary" else "none",
        )


def check_size(encoder: ViTConfig, images: Float[Array, "B *size C"]) -> None:
    """Refuses images in which the numbers of patches are not those of the encoder's size.

    Fewer frames, or rows, are no harm: the last numbers are then missing.

    Raises:
        ValueError: If the images are longer than the config says, or otherwise of another size.
    """
    size = images.shape[1:-1]
    if size[1:] != encoder.size[1:] or size[0] > encoder.size[0]:
        found, known = ("×".join(map(str, x)) for x in (size, encoder.size))
        raise ValueError(f"patches are predicted in images of {known}, got {found}.")


class Predictor(nn.Module):
    """Vectors of seen patches in, predictions of all patches out.

    Attributes:
        config: Its sizes.
        encoder: The config of what made the vectors.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps.

    References:
        He et al. 2022, "Masked autoencoders" (the decoder). https://arxiv.org/abs/2111.06377
        Assran et al. 2023, "I-JEPA", section 3. https://arxiv.org/abs/2301.08243
    """

    config: PredictorConfig
    encoder: ViTConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    @nn.compact
    def __call__(
        self,
        seen: Float[Array, "B K1 D"],
        keep: Int[Array, "B K"],
        targets: Int[Array, "B M"],
        mask: Mask | None = None,
        *,
        which: int = 0,
        train: bool = False,
    ) -> Float[Array, "B T outputs"]:
        """Predicts at the targets, and what it makes of the seen patches.

        Args:
            seen: What the encoder made of the kept patches, tokens before them included.
            keep: Numbers of these patches.
            targets: Numbers of the patches to be predicted.
            mask: Who may look, of all tokens: those before, the kept, the targets; all at all if
                None.
            which: Number of the mask token, counted around.
            train: Drops; needs an rng named "dropout" if there is anything to drop.

        Returns:
            For the kept patches in their order, then for the targets; K + M in all.
        """
        config, encoder = self.config, self.encoder
        prefix = encoder.prefix
        tokens = self.param("mask_tokens", _INIT, (config.mask_tokens, config.width))
        x = Dense(config.width, use_bias=True, name="embed")(seen)
        token = tokens[which % config.mask_tokens].astype(x.dtype)[None, None]
        token = jnp.broadcast_to(token, (*targets.shape, config.width))
        numbers, turning = jnp.concatenate([keep, targets], axis=1), {}
        x = jnp.concatenate([x, token], axis=1)
        if config.positions == "rotary":
            coordinates = jnp.asarray(encoder.rope.coordinates(encoder.grid))[numbers]
            turning["positions"] = jnp.pad(coordinates, ((0, 0), (prefix, 0), (0, 0)))
        else:
            learned = config.positions == "learned"
            places = GridPositions(encoder.grid, config.width, learned, prefix, name="places")
            table = places(encoder.grid).astype(x.dtype)
            first = jnp.broadcast_to(table[None, :prefix], (x.shape[0], prefix, config.width))
            x = x + jnp.concatenate([first, table[prefix:][numbers]], axis=1)
        trunk = config.trunk(encoder)
        means = Means(self.attend, self.project)
        x = stack(trunk, cross=False, name="blocks", means=means)(x, mask, train=train, **turning)
        x = trunk.make_norm()(name="norm")(x)[:, prefix:]
        return Dense(config.outputs, use_bias=True, name="head")(x)
