"""An encoder-decoder: writes one text while reading another."""

from flax import linen as nn

from jaxformer.layers.attention import StackCache, cached_length
from jaxformer.layers.linear import Dense
from jaxformer.layers.norms import RMSNorm
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import TransformerConfig, empty_cache, stack
from jaxformer.ops import attention
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


class EncoderDecoder(nn.Module):
    """An encoder and causal blocks that look at what it says; both share the embedding table.

    Attributes:
        config: Sizes of each half.
    """

    config: TransformerConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.blocks = stack(self.config, cross=True, name="blocks")
        self.norm = RMSNorm()
        if not self.config.tie_embeddings:
            self.head = Dense(self.config.vocab_size)

    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        source_mask: Mask | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Predicts what follows each token of the target.

        Args:
            source: The text to read.
            target: The text to write, from its start token on.
            source_mask: Which keys of the source exist, such as `key_lengths`; all if None.
            train: Turns dropout on; needs an rng named "dropout".
        """
        context = self.encode(source, source_mask, train=train)
        return self.decode(target, context, source_mask, train=train)  # pyright: ignore[reportReturnType]

    def encode(
        self, source: Int[Array, "B S"], source_mask: Mask | None = None, *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Encodes the text to read, once for all that is written about it."""
        return self.encoder(source, source_mask, train=train)

    def decode(
        self,
        target: Int[Array, "B T"],
        context: Float[Array, "B S D"],
        source_mask: Mask | None = None,
        cache: StackCache | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache]:
        """Predicts what follows each token; with a cache the new cache is returned too.

        Args:
            target: The text so far, or with a cache, what comes after it.
            context: From `encode`.
            source_mask: As for `encode`.
            cache: From `empty_cache`.
            train: Turns dropout on; needs an rng named "dropout".
        """
        mask = attention.causal(0 if cache is None else cached_length(cache))
        x = self.encoder.embed(target)
        x = self.blocks(
            x, mask, context=context, context_mask=source_mask, cache=cache, train=train
        )
        x, *caches = x if cache is not None else (x,)
        x = self.norm(x)
        tied = self.config.tie_embeddings
        logits = self.encoder.embed.logits(x) if tied else self.head(x)
        return (logits, *caches) if caches else logits

    @nn.nowrap
    def empty_cache(self, batch: int, max_length: int, dtype: DTypeLike = "float32") -> StackCache:
        """Makes a cache for `batch` targets of up to `max_length` tokens."""
        return empty_cache(self.config, batch, max_length, dtype)
