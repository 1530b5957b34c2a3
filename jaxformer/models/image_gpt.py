"""A decoder of small pictures: a grid of patches read row by row, after a token for the class."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxformer.layers import stack
from jaxformer.layers.attention import SelfAttention, StackCache, cached_length
from jaxformer.layers.block import Block, PreNorm
from jaxformer.layers.embed import Embed, LearnedPositions, NeighbourEmbed
from jaxformer.layers.linear import Dense
from jaxformer.layers.mlp import MLP
from jaxformer.layers.norms import RMSNorm
from jaxformer.layers.stack import Stack
from jaxformer.ops import activations, attention, linear, patches
from jaxformer.typing import Array, Bool, DTypeLike, Float, Int

_NEAR = tuple((row, column) for row in (-2, -1) for column in (-2, -1, 0, 1, 2))


@dataclasses.dataclass(frozen=True)
class ImageGPTConfig:
    """Sizes of an ImageGPT on binary pictures.

    Attributes:
        side: Height and width of a picture in pixels.
        patch: Height and width of a patch in pixels; its bits make one token.
        num_classes: Classes one can ask for.
        width: D.
        num_layers: Blocks.
        num_heads: N.
        hidden: F.
        neighbours: Cells, as (rows, columns) from the predicted one, that are embedded directly.
        dropout: Share of each branch dropped in training.
        scan: Scans over the blocks; on CPU unrolled is faster.
        remat: Recomputes each block in the backward pass.
    """

    side: int = 28
    patch: int = 2
    num_classes: int = 10
    width: int = 64
    num_layers: int = 4
    num_heads: int = 2
    hidden: int = 256
    neighbours: tuple[tuple[int, int], ...] = (*_NEAR, (0, -2), (0, -1))
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("side", "patch", "num_classes", "width", "num_layers", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.side % self.patch:
            raise ValueError(f"side={self.side} is not a multiple of patch={self.patch}.")
        if self.width % self.num_heads:
            raise ValueError(f"D={self.width} is not a multiple of N={self.num_heads}.")

    @classmethod
    def mnist(cls) -> "ImageGPTConfig":
        """The model of `experiments/ar_mnist.py`: 0.2 M parameters, minutes on two CPU cores."""
        return cls()

    @classmethod
    def mnist_large(cls) -> "ImageGPTConfig":
        """A model for full MNIST on one accelerator: 18 M parameters."""
        return cls(width=384, num_layers=10, num_heads=6, hidden=1536, dropout=0.1, scan=True)

    @property
    def cells(self) -> int:
        """Tokens of a picture."""
        return (self.side // self.patch) ** 2

    @property
    def vocab_size(self) -> int:
        """V: values of a patch; the token for class c is V + c."""
        return 2 ** (self.patch**2)


class Cache(NamedTuple):
    """The sequence so far, for the neighbours, and the keys and values of every block."""

    tokens: Int[Array, "B S"]
    blocks: StackCache


class ImageGPT(nn.Module):
    """Predicts each cell of a picture from the class and the cells before it.

    The sequence is the class token followed by the cells, and position t gives the logits of
    cell t. What the blocks read is a sum: the position's vector, the class's, and one for each of
    the cell's known neighbours (`NeighbourEmbed`). A cell is read as a neighbour only, so the last
    of a row is not seen before the cell below it comes near.

    Attributes:
        config: Sizes.
        attend: Any function with the signature of `ops.attention.attend`; with a cache it must
            honour `causal(offset)`.
        project: The product of all linear maps.

    References:
        Chen et al. 2020, "Generative pretraining from pixels" (iGPT); here with a class token,
        patches of bits, neighbour embeddings, QK-norm and squared ReLU.
        https://proceedings.mlr.press/v119/chen20s.html
    """

    config: ImageGPTConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        config = self.config
        columns = config.side // config.patch
        self.classes = Embed(config.num_classes, config.width)
        self.neighbours = NeighbourEmbed(
            config.vocab_size, config.width, columns, config.neighbours
        )
        self.positions = LearnedPositions(config.cells)
        zeros = nn.initializers.zeros
        block = functools.partial(
            Block,
            attention=functools.partial(
                SelfAttention,
                config.num_heads,
                norm=RMSNorm,
                attend=self.attend,
                project=self.project,
                out_init=zeros,
            ),
            mlp=functools.partial(
                MLP,
                config.hidden,
                activations.relu_squared,
                project=self.project,
                out_init=zeros,
            ),
            residual=functools.partial(PreNorm, dropout=config.dropout),
        )
        self.blocks = Stack(block, config.num_layers, scan=config.scan, remat=config.remat)
        self.norm = RMSNorm()
        self.head = Dense(config.vocab_size, kernel_init=zeros)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        *,
        last: bool = False,
        train: bool = False,
    ) -> Float[Array, "B #T V"] | tuple[Float[Array, "B #T V"], Cache]:
        """Predicts the cell that follows each token.

        Args:
            tokens: The class token and the cells after it, all but the last at most; or with a
                cache, what comes after the sequence so far.
            cache: From `empty_cache`; with it the new cache is returned too.
            last: Scores what follows the last token alone: T is 1 in the logits.
            train: Turns dropout on; needs an rng named "dropout".

        Returns:
            Logits in float32; NaN where a token is read that cannot be at its place, and past the
            end of the picture.

        Raises:
            ValueError: If T exceeds the cells of the picture.
        """
        count = tokens.shape[1]
        if count > self.config.cells:
            raise ValueError(f"T={count} exceeds the {self.config.cells} cells.")
        read = slice(-1 if last else 0, None)
        if cache is None:
            x = self.blocks(self._embed(tokens), attention.causal(), train=train)
            return self._logits(x[:, read])

        start = cached_length(cache.blocks)
        new = tokens.astype(cache.tokens.dtype)
        sequence = lax.dynamic_update_slice(cache.tokens, new, (0, start))
        x = self._embed(sequence, start, count)
        x, blocks = self.blocks(x, attention.causal(start), cache=cache.blocks, train=train)
        return self._logits(x[:, read]), Cache(sequence, blocks)

    def _embed(self, sequence: Array, first: int | Array = 0, count: int | None = None) -> Array:
        classes = self.classes(sequence[:, :1] - self.config.vocab_size)
        return self.positions(self.neighbours(sequence, first, count) + classes, first)

    def _logits(self, x: Array) -> Array:
        return self.head(self.norm(x)).astype(jnp.float32)

    @nn.nowrap
    def empty_cache(self, batch: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """Makes a cache for `batch` whole pictures."""
        config = self.config
        channels = config.width // config.num_heads
        sizes = (batch, config.num_heads, config.cells, channels)
        blocks = stack.empty_cache(config.num_layers, config.scan, *sizes, dtype)
        return Cache(jnp.zeros((batch, config.cells), jnp.int32), blocks)


def to_tokens(
    images: Int[Array, "B side side"] | Bool[Array, "B side side"], config: ImageGPTConfig
) -> Int[Array, "B P"]:
    """Reads binary pictures as cells, row by row; the first pixel of a patch is its highest bit.

    Raises:
        ValueError: If the pictures have another size than the config's.
    """
    if images.shape[1:] != (config.side, config.side):
        raise ValueError(f"pictures of {images.shape[1:]} pixels, expected side={config.side}.")
    cells = patches.patchify(images[..., None], (config.patch, config.patch))
    return patches.bits_to_tokens(cells)


def to_images(cells: Int[Array, "B P"], config: ImageGPTConfig) -> Int[Array, "B side side"]:
    """Draws cells as binary pictures: the exact inverse of `to_tokens`.

    Raises:
        ValueError: If there are more or fewer cells than the config's picture has.
    """
    bits = patches.tokens_to_bits(cells, config.patch**2)
    size, patch = (config.side, config.side), (config.patch, config.patch)
    return patches.unpatchify(bits, patch, size)[..., 0].astype(jnp.int32)


def with_class(
    classes: Int[Array, "B"], cells: Int[Array, "B P"], config: ImageGPTConfig
) -> Int[Array, "B P"]:
    """Puts the class token in front and leaves the last cell out: what the model reads."""
    start = (classes + config.vocab_size)[:, None].astype(cells.dtype)
    return jnp.concatenate([start, cells[:, :-1]], axis=1)


def log_likelihood(logits: Float[Array, "B P V"], cells: Int[Array, "B P"]) -> Float[Array, "B"]:
    """Sums the log-probabilities of a picture's cells, in nats."""
    each = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(each, cells[..., None], axis=-1)[..., 0].sum(-1)
