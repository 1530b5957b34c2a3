"""A decoder-only language model: each token's logits depend on the tokens up to it."""

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.attention import StackCache, cached_length
from jaxformer.layers.embed import Embed
from jaxformer.layers.linear import Dense
from jaxformer.layers.norms import RMSNorm
from jaxformer.models.transformer import TransformerConfig, empty_cache, stack
from jaxformer.ops import attention
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


class Decoder(nn.Module):
    """Embedding, causal blocks, norm, logits.

    Attributes:
        config: Sizes.
    """

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        self.embed = Embed(config.vocab_size, config.width)
        self.blocks = stack(config, cross=False, name="blocks")
        self.norm = RMSNorm()
        if not config.tie_embeddings:
            self.head = Dense(config.vocab_size)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: StackCache | None = None,
        *,
        mask: Mask | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache]:
        """Predicts what follows each token.

        Args:
            tokens: The text, or with a cache, what comes after the text so far.
            cache: From `empty_cache`; with it the new cache is returned too.
            mask: Narrows who may look, besides causality: segments, windows, key lengths. With a
                cache it is of the T new tokens at all places of the cache.
            train: Turns dropout on; needs an rng named "dropout".
        """
        causal = attention.causal(0 if cache is None else cached_length(cache))
        mask = causal if mask is None else causal & mask
        x = self.blocks(self.embed(tokens), mask, cache=cache, train=train)
        x, *caches = x if cache is not None else (x,)
        x = self.norm(x)
        logits = self.embed.logits(x) if self.config.tie_embeddings else self.head(x)
        return (logits, *caches) if caches else logits

    @nn.nowrap
    def empty_cache(
        self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32
    ) -> StackCache:
        """Makes a cache for `batch` rows of up to `max_length` tokens."""
        return empty_cache(self.config, batch, max_length, dtype)
