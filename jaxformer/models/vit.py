"""A Transformer that reads patches: of images, of clips, of anything on a grid."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.embed import GridPositions
from jaxformer.layers.linear import Dense
from jaxformer.models.transformer import Means, TransformerConfig, stack
from jaxformer.ops import attention, linear, patch_masks, patches
from jaxformer.ops.attention import Mask
from jaxformer.ops.rope import GridRope
from jaxformer.typing import Array, Bool, Float, Int

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
POOLS = ("token", "mean", "both")
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes and choices of a vision Transformer; the defaults are those of ViT.

    Attributes:
        size: Height and width of an image in pixels, for which learned positions are made; others
            have them interpolated. A clip has its frames before these.
        patch: Size of a patch on each axis.
        channels: C, of a pixel.
        width: D.
        num_layers: Blocks.
        num_heads: N.
        hidden: F.
        class_token: Whether a learned token stands before the patches, to read them all.
        registers: Learned tokens between it and the patches.
        mask_token: Whether there is a learned vector for patches that are hidden.
        positions: "learned", "sinusoidal", "rotary" or "none".
        class_position: Whether the class token has a row in the table of learned positions.
        antialias: Whether learned positions are averaged where they are interpolated to fewer.
        rope: How rotary positions turn.
        activation: "gelu", "gelu_tanh", "relu", "relu_squared" or "silu".
        gated: Whether one half of the hidden channels gates the other.
        qkv_bias: Of the projections to queries, keys and values.
        key_bias: Whether that to keys has one too.
        epsilon: Of all norms.
        layer_scale: First value of a learned scale of each branch; None for none.
        dropout: Share of each branch dropped in training.
        drop_path: Probability of leaving out the last block's branches in training.
        pool: What stands for an image: the class token ("token"), the mean of the patches ("mean"),
            or both side by side ("both").
        pooler: Whether a map and tanh follow.
        num_classes: V of the logits; 0 for no head.
        scan: Scans over the blocks.
        remat: Recomputes each block in the backward pass.

    References:
        Dosovitskiy et al. 2021, "An image is worth 16×16 words". https://arxiv.org/abs/2010.11929
        Darcet et al. 2024, "Vision transformers need registers". https://arxiv.org/abs/2309.16588
    """

    size: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    class_token: bool = True
    registers: int = 0
    mask_token: bool = False
    positions: str = "learned"
    class_position: bool = True
    antialias: bool = False
    rope: GridRope = GridRope()
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    epsilon: float = 1e-6
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    pool: str = "token"
    pooler: bool = False
    num_classes: int = 0
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        patches.grid_of(self.size, self.patch)
        for name in ("width", "num_layers", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.channels < 1 or self.registers < 0 or self.num_classes < 0:
            raise ValueError(f"C must be positive, counts not negative: {self}.")
        if self.width % self.num_heads:
            raise ValueError(f"D={self.width} is not a multiple of N={self.num_heads}.")
        for name, known in {"positions": POSITIONS, "pool": POOLS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.pool != "mean" and not self.class_token:
            raise ValueError(f"pool={self.pool!r} needs a class token.")
        self.trunk()

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches on each axis of an image of `size`."""
        return patches.grid_of(self.size, self.patch)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token) + self.registers

    @property
    def placed_class(self) -> bool:
        """Whether the class token has a learned position."""
        return self.class_token and self.class_position and self.positions == "learned"

    def trunk(self) -> TransformerConfig:
        """What the blocks are made of."""
        return TransformerConfig(
            vocab_size=1,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            hidden=self.hidden,
            dropout=self.dropout,
            drop_path=self.drop_path,
            layer_scale=self.layer_scale,
            scan=self.scan,
            remat=self.remat,
            norm="layer",
            epsilon=self.epsilon,
            positions="rotary" if self.positions == "rotary" else "none",
            rope=self.rope,
            activation=self.activation,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            out_bias=True,
            mlp_bias=True,
        )

    @classmethod
    def of_size(cls, name: str, size: int = 224, **choices: Any) -> "ViTConfig":
        """A published size such as "B/16" (Ti, S, B, L, H or g, and the side of a patch).

        Raises:
            ValueError: If there is no such size.
        """
        letter, _, side = name.partition("/")
        if letter not in _SIZES or not side.isdigit():
            raise ValueError(f"there is no ViT {name!r}: expected one of {[*_SIZES]}, as B/16.")
        width, num_layers, num_heads, hidden = _SIZES[letter]
        patch = (int(side), int(side))
        return cls((size, size), patch, 3, width, num_layers, num_heads, hidden, **choices)


_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}


class ViT(nn.Module):
    """Patches, positions, blocks, norm: vectors of an image's tokens, one of the image, or logits.

    The parameters of the head appear where the model is initialised with `method="logits"`, those
    of the pooler with that or `method="pooled"`.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the blocks' linear maps.
    """

    config: ViTConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        config = self.config
        self.embed = Dense(config.width, use_bias=True)
        if config.class_token:
            self.class_token = self.param("class_token", _INIT, (config.width,))
        if config.registers:
            self.registers = self.param("registers", _INIT, (config.registers, config.width))
        if config.mask_token:
            self.mask_token = self.param("mask_token", _INIT, (config.width,))
        if config.positions in ("learned", "sinusoidal"):
            rows, learned = int(config.placed_class), config.positions == "learned"
            antialias = config.antialias
            self.places = GridPositions(config.grid, config.width, learned, rows, antialias)
        means = Means(self.attend, self.project)
        self.blocks = stack(config.trunk(), cross=False, name="blocks", means=means)
        self.norm = config.trunk().make_norm()()
        if config.pooler:
            self.pool = Dense(config.width, use_bias=True)
        if config.num_classes:
            self.head = Dense(config.num_classes, use_bias=True)

    def __call__(
        self,
        images: Float[Array, "B *size C"],
        mask: Mask | None = None,
        *,
        keep: Int[Array, "B K"] | None = None,
        hidden: Bool[Array, "B P"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Encodes each patch in its context.

        Args:
            images: Of the config's size, or of another that patches divide.
            mask: Who may look, of all T tokens; all at all if None.
            keep: Numbers of the patches that are seen at all, row by row; all in order if None. One
                of P or more is padding, which `mask` should keep from being read.
            hidden: Patches in whose stead the mask token is seen.
            train: Drops; needs an rng named "dropout" if there is anything to drop.

        Returns:
            The class token, the registers, then the patches: from `config.prefix` on.

        Raises:
            ValueError: If patches do not divide the images, or channels or `hidden` are not the
                config's.
        """
        config = self.config
        x, coordinates = self.embedded(images, keep, hidden)
        turning: Any = {"positions": coordinates} if config.positions == "rotary" else {}
        return self.norm(self.blocks(x, mask, train=train, **turning))

    def pooled(
        self, images: Float[Array, "B *size C"], mask: Mask | None = None, **kwargs: Any
    ) -> Float[Array, "B features"]:
        """Encodes each image as one vector; takes what a call takes.

        Numbers in `keep` that are padding do not enter a mean.
        """
        config, keep = self.config, kwargs.get("keep")
        x = self(images, mask, **kwargs)
        if config.pool == "token":
            x = x[:, 0]
        else:
            real = None
            if keep is not None:
                real = (keep < math.prod(patches.grid_of(images.shape[1:-1], config.patch)))[
                    ..., None
                ]
            mean = x[:, config.prefix :].mean(axis=1, dtype=jnp.float32, where=real)
            mean = mean.astype(x.dtype)
            x = mean if config.pool == "mean" else jnp.concatenate([x[:, 0], mean], axis=-1)
        return jnp.tanh(self.pool(x)) if config.pooler else x

    def logits(
        self, images: Float[Array, "B *size C"], mask: Mask | None = None, **kwargs: Any
    ) -> Float[Array, "B V"]:
        """Scores every class; takes what a call takes.

        Raises:
            ValueError: If the config has no classes.
        """
        if not self.config.num_classes:
            raise ValueError("the config has num_classes=0: there is no head.")
        return self.head(self.pooled(images, mask, **kwargs))

    def embedded(
        self, images: Array, keep: Array | None, hidden: Array | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "#B T A"]]:
        """What the first block reads, and where each token stands."""
        config = self.config
        batch, *size, channels = images.shape
        if channels != config.channels:
            raise ValueError(f"images have C={channels} channels, expected {config.channels}.")
        if hidden is not None and not config.mask_token:
            raise ValueError("patches are hidden, but the config has no mask token.")
        grid = patches.grid_of(tuple(size), config.patch)
        cut = patches.patchify(images, config.patch)
        coordinates = jnp.asarray(config.rope.coordinates(grid))[None]
        place = places = None
        if config.positions in ("learned", "sinusoidal"):
            rows = self.places(grid)
            if config.placed_class:
                place, rows = rows[:1], rows[1:]
            places = rows[None]
        if keep is not None:
            cut, coordinates = _rows(cut, keep), _rows(coordinates, keep)
            places = None if places is None else _rows(places, keep)
            hidden = None if hidden is None else _rows(hidden, keep)
        x = self.embed(cut)
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.mask_token.astype(x.dtype)[None, None], x)
        if places is not None:
            x = x + places.astype(x.dtype)
        first = self.before(place)
        if first is not None:
            first = jnp.broadcast_to(first.astype(x.dtype)[None], (batch, *first.shape))
            x = jnp.concatenate([first, x], axis=1)
            coordinates = jnp.pad(coordinates, ((0, 0), (config.prefix, 0), (0, 0)))
        return x, coordinates

    def before(self, place: Array | None) -> Float[Array, "prefix D"] | None:
        """The tokens that stand before the patches; None for none."""
        config, found = self.config, []
        if config.class_token:
            token = self.class_token[None]
            found.append(token if place is None else token + place)
        if config.registers:
            found.append(self.registers)
        return jnp.concatenate(found) if found else None


def _rows(x: Array, keep: Array) -> Array:
    """Takes rows of `x`, which may be the same for the whole batch."""
    if x.shape[0] == 1:
        return x[0].at[keep].get(mode="fill", fill_value=0)
    return patch_masks.gather_patches(x, keep)
