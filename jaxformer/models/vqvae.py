"""Images as a grid of codes: an encoder, a quantiser and a decoder, trained together."""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn

from jaxformer.layers.embed import GridPositions
from jaxformer.layers.linear import Dense
from jaxformer.models.transformer import TransformerConfig, stack
from jaxformer.ops import codebook, patches
from jaxformer.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ConvCoder:
    """Convolutions with strides of 2, then residual blocks; the decoder is the mirror image.

    Attributes:
        width: Channels.
        hidden: Channels inside a residual block.
        num_layers: Residual blocks of each half.
    """

    width: int = 64
    hidden: int = 32
    num_layers: int = 2

    def encoder(self, config: "VQVAEConfig") -> nn.Module:
        """Makes the module from images to a vector a patch."""
        return ConvEncoder(self, _doublings(config))

    def decoder(self, config: "VQVAEConfig") -> nn.Module:
        """Makes the module from a vector a patch to images."""
        return ConvDecoder(self, _doublings(config), config.grid, config.channels)


@dataclasses.dataclass(frozen=True)
class ViTCoder:
    """Transformers over patches, each of which sees all; positions are two-dimensional waves.

    Attributes:
        width: D.
        num_layers: Blocks of each half.
        num_heads: N.
        hidden: F.
    """

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    hidden: int = 256

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.num_heads:
            raise ValueError(f"D={self.width} must be a multiple of 4 and of N={self.num_heads}.")

    def encoder(self, config: "VQVAEConfig") -> nn.Module:
        """Makes the module from images to a vector a patch."""
        return ViTEncoder(self, config.patch, config.grid)

    def decoder(self, config: "VQVAEConfig") -> nn.Module:
        """Makes the module from a vector a patch to images."""
        return ViTDecoder(self, config.patch, config.grid, config.channels)

    def trunk(self) -> TransformerConfig:
        """What the blocks of one half are made of."""
        return TransformerConfig(
            vocab_size=1,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            hidden=self.hidden,
            positions="none",
            activation="gelu",
            gated=False,
        )


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """What images are cut into, and what encodes and decodes them.

    Attributes:
        size: Height and width of an image in pixels.
        channels: Of a pixel.
        patch: Height and width in pixels of what one code stands for; a power of 2 for convolution.
        coder: Sizes of encoder and decoder, which tell the architecture as well.
    """

    size: tuple[int, int] = (28, 28)
    channels: int = 1
    patch: int = 4
    coder: ConvCoder | ViTCoder = ConvCoder()

    def __post_init__(self) -> None:
        for config in (self, self.coder):
            for name, value in vars(config).items():
                if isinstance(value, int) and value < 1:
                    raise ValueError(f"{name} must be positive, got {value}.")
        if isinstance(self.coder, ConvCoder):
            _doublings(self)
        _ = self.grid

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes.

        Raises:
            ValueError: If a patch does not divide the image.
        """
        rows, columns = patches.grid_of(self.size, (self.patch, self.patch))
        return rows, columns


class Reconstruction(NamedTuple):
    """What a VQVAE makes of images.

    Attributes:
        images: Decoded from the codes; linear, so that some pixels lie beyond the range.
        ids: Of the codes, row by row.
        distortion: Mean square error of a pixel.
        quantizer_loss: What the quantiser adds to the loss.
        perplexity: Of the codes that this batch uses.
    """

    images: Float[Array, "B height width C"]
    ids: Int[Array, "B P"]
    distortion: Float[Array, ""]
    quantizer_loss: Float[Array, ""]
    perplexity: Float[Array, ""]


class VQVAE(nn.Module):
    """Encodes images as a grid of codes and decodes them again.

    Attributes:
        config: Sizes, and the architecture of encoder and decoder.
        quantizer: A layer such as those of `layers.quantize`, not yet bound.

    References:
        van den Oord et al. 2017, "Neural discrete representation learning", sections 3 and 4.1.
        https://arxiv.org/abs/1711.00937
    """

    config: VQVAEConfig
    quantizer: nn.Module

    def setup(self) -> None:
        self.encoder = self.config.coder.encoder(self.config)
        self.decoder = self.config.coder.decoder(self.config)

    def __call__(
        self, images: Float[Array, "B height width C"], train: bool = False, **options: Any
    ) -> Reconstruction:
        """Encodes and decodes.

        Args:
            images: Of the config's size, with numbers from 0 to 1.
            train: Quantises as in training: some layers draw from the rng "quantizer", or change
                the collection "codebook".
            **options: For the quantiser, such as a temperature.

        Raises:
            ValueError: If the images are of another size than the config's.
        """
        quantized = self.quantizer(self.encoded(images), train=train, **options)
        drawn = self.decoder(quantized.vectors)
        distortion = codebook.commitment_loss(drawn, images)
        counts = codebook.usage(quantized.ids, self.quantizer.vocab_size)
        perplexity = codebook.perplexity(counts)
        return Reconstruction(drawn, quantized.ids, distortion, quantized.loss, perplexity)

    def encoded(self, images: Float[Array, "B height width C"]) -> Float[Array, "B P D"]:
        """The vector of each patch before it is quantised."""
        expected = (*self.config.size, self.config.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images of {images.shape[1:]}, expected {expected}.")
        return self.encoder(images)

    def encode(self, images: Float[Array, "B height width C"]) -> Int[Array, "B P"]:
        """The codes of images, row by row.

        Raises:
            ValueError: As when called.
        """
        return self.quantizer(self.encoded(images)).ids

    def decode(self, ids: Int[Array, "B P"]) -> Float[Array, "B height width C"]:
        """The images of codes."""
        return self.decoder(self.quantizer.lookup(ids))


class Residual(nn.Module):
    """`x + conv(relu(conv(relu(x))))`, the second convolution of one pixel.

    Attributes:
        hidden: Channels between.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B height width D"]) -> Float[Array, "B height width D"]:
        """Adds what the neighbourhood of each place tells."""
        y = nn.Conv(self.hidden, (3, 3), name="near")(nn.relu(x))
        return x + nn.Conv(x.shape[-1], (1, 1), name="out")(nn.relu(y))


class ConvEncoder(nn.Module):
    """Halves the image some times, then looks around at each place.

    Attributes:
        config: Sizes.
        halvings: How often.
    """

    config: ConvCoder
    halvings: int

    @nn.compact
    def __call__(self, images: Float[Array, "B height width C"]) -> Float[Array, "B P D"]:
        """Encodes each patch with what surrounds it."""
        x, width = images, self.config.width
        for i in range(self.halvings):
            # The first ones, of many pixels, have fewer channels
            channels = max(1, width >> (self.halvings - 1 - i))
            x = nn.relu(nn.Conv(channels, (4, 4), strides=2, name=f"down_{i}")(x))
        x = nn.Conv(width, (3, 3), name="near")(x)
        for i in range(self.config.num_layers):
            x = Residual(self.config.hidden, name=f"residual_{i}")(x)
        return nn.relu(x).reshape(x.shape[0], -1, width)


class ConvDecoder(nn.Module):
    """Looks around at each place, then doubles the image some times.

    Attributes:
        config: Sizes.
        doublings: How often.
        grid: Rows and columns to begin with.
        channels: Of a pixel.
    """

    config: ConvCoder
    doublings: int
    grid: tuple[int, int]
    channels: int

    @nn.compact
    def __call__(self, vectors: Float[Array, "B P D"]) -> Float[Array, "B height width C"]:
        """Draws the image of the codes' vectors."""
        x = vectors.reshape(vectors.shape[0], *self.grid, -1)
        x = nn.Conv(self.config.width, (3, 3), name="near")(x)
        for i in range(self.config.num_layers):
            x = Residual(self.config.hidden, name=f"residual_{i}")(x)
        for i in range(self.doublings):
            last = i == self.doublings - 1
            channels = self.channels if last else max(1, self.config.width >> (i + 1))
            # On a CPU three times as fast as a transposed convolution
            y = nn.Conv(4 * channels, (3, 3), name=f"up_{i}")(nn.relu(x))
            batch, rows, columns, _ = y.shape
            size = (2 * rows, 2 * columns)
            x = patches.unpatchify(y.reshape(batch, rows * columns, -1), (2, 2), size)
        return x


class ViTEncoder(nn.Module):
    """Patches, positions, blocks.

    Attributes:
        config: Sizes.
        patch: Side of a patch in pixels.
        grid: Rows and columns of patches.
    """

    config: ViTCoder
    patch: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, images: Float[Array, "B height width C"]) -> Float[Array, "B P D"]:
        """Encodes each patch with what surrounds it."""
        x = patches.patchify(images, (self.patch, self.patch))
        x = Dense(self.config.width, use_bias=True, name="embed")(x)
        return _blocks(self.config.trunk(), _placed(x, self.grid))


class ViTDecoder(nn.Module):
    """Positions, blocks, pixels of each patch.

    Attributes:
        config: Sizes.
        patch: Side of a patch in pixels.
        grid: Rows and columns of patches.
        channels: Of a pixel.
    """

    config: ViTCoder
    patch: int
    grid: tuple[int, int]
    channels: int

    @nn.compact
    def __call__(self, vectors: Float[Array, "B P D"]) -> Float[Array, "B height width C"]:
        """Draws the image of the codes' vectors."""
        x = Dense(self.config.width, use_bias=True, name="embed")(vectors)
        x = _blocks(self.config.trunk(), _placed(x, self.grid))
        x = Dense(self.patch**2 * self.channels, use_bias=True, name="pixels")(x)
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        return patches.unpatchify(x, (self.patch, self.patch), size)


def _blocks(config: TransformerConfig, x: Array) -> Array:
    """Passes the stream through blocks and a norm of the module that calls."""
    return config.make_norm()(name="norm")(stack(config, cross=False, name="blocks")(x))


def _placed(x: Array, grid: tuple[int, int]) -> Array:
    """Adds the waves of row and column to each patch."""
    waves = GridPositions(grid, x.shape[-1], learned=False)(grid)
    return x + waves.astype(x.dtype)[None]


def _doublings(config: VQVAEConfig) -> int:
    if config.patch < 2 or config.patch & (config.patch - 1):
        raise ValueError(f"strides of 2 need patch=2, 4, 8, ..., got patch={config.patch}.")
    return config.patch.bit_length() - 1
