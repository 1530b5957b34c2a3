"""A decoder-only language model: each token's logits depend on the tokens up to it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.attention import StackCache, cached_length, rewound, select_rows
from jaxformer.models.skeleton import Skeleton
from jaxformer.models.transformer import (
    empty_cache,
    last_of_each,
    max_rewind,
    refuse_beyond,
    refuse_for_decoder,
)
from jaxformer.ops import attention
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What a decoder remembers of each row; rows grow each by itself.

    Attributes:
        blocks: Keys and values.
        max_length: Tokens that a row has room for.
        max_rewind: Tokens that `rewind` can forget: 15 in layers with a window; None for all.
    """

    blocks: StackCache
    max_length: int = dataclasses.field(metadata={"static": True})
    max_rewind: int | None = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens so far."""
        return cached_length(self.blocks)

    def select(self, rows: Int[Array, "R"]) -> "DecoderCache":
        """Takes rows of the batch, in any order and number."""
        return dataclasses.replace(self, blocks=select_rows(self.blocks, rows))

    def rewind(self, lengths: Int[Array, "B"]) -> "DecoderCache":
        """Forgets the tokens from `lengths` on, `max_rewind` at most."""
        return dataclasses.replace(self, blocks=rewound(self.blocks, lengths))


class Decoder(Skeleton):
    """Embedding, causal blocks, norm, logits.

    Attributes:
        config: Sizes and choices.
        attend: As in all skeletons, such as `flash.attend`.
        project: Likewise, such as `linear.project_input_first`.
    """

    def setup(self) -> None:
        refuse_for_decoder(self.config)
        self.make_parts(self.config.vocab_size, causal=True)
        self.blocks = self.make_blocks(self.config, cross=False)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        counts: Int[Array, "B"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Array, "B T"] | Int[Array, "T"] | None = None,
        last: bool = False,
        train: bool = False,
    ) -> Float[Array, "B #T V"] | tuple[Float[Array, "B #T V"], DecoderCache]:
        """Predicts what follows each token.

        Args:
            tokens: The text, or with a cache, what comes after the text so far.
            cache: From `empty_cache`; with it the new cache is returned too.
            counts: How many of the T tokens of each row are real; the logits of the others mean
                nothing, and they leave no trace in a cache. All if None.
            mask: Narrows who may look, besides causality: segments, windows, key lengths. With a
                cache it is of the T new tokens at all places of the text; one that counts from the
                query's place needs `offset=cache.length`.
            positions: Place of each token; counted on from the cache's length, or 0.
            last: Scores what follows the last real token of each row alone: T is 1 in the logits.
            train: Turns dropout on; needs an rng named "dropout".

        Raises:
            ValueError: If the text is longer than the table of learned positions, or a mask that
                comes with a cache has another T, or not S = `cache.max_length`.
        """
        x, length, bias = self.embedded(tokens, cache, positions), tokens.shape[1], None
        if self.config.positions == "buckets":
            keys: Any = (length,) if cache is None else (cache.max_length, cache.length)
            bias = self.bias(length, *keys)
        if mask is not None and cache is not None:
            mask = mask.canonical(length, cache.max_length)  # layers with a window know no S
        past = attention.causal(0 if cache is None else cache.length)
        mask = past if mask is None else past & mask
        if cache is None:
            x = self.blocks(x, mask, bias=bias, positions=positions, train=train)
            return self.predicted(last_of_each(x, counts) if last else x)
        x, blocks = self.blocks(
            x,
            mask,
            bias=bias,
            cache=cache.blocks,
            positions=positions,
            counts=counts,
            train=train,
        )
        return self.predicted(last_of_each(x, counts) if last else x), dataclasses.replace(
            cache, blocks=blocks
        )

    def embedded(
        self, tokens: Array, cache: DecoderCache | None, places: Array | None
    ) -> Float[Array, "B T D"]:
        """What the first block reads."""
        length = tokens.shape[1]
        if places is None:
            places = jnp.arange(length)
            if cache is not None:
                places = cache.length[:, None] + places[None]
        return self.placed(self.scaled(tokens), places.reshape(-1, length))

    @nn.nowrap
    def empty_cache(
        self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32
    ) -> DecoderCache:
        """Makes a cache for `batch` rows of up to `max_length` tokens.

        Raises:
            ValueError: If that is more than the config's `max_length`, whatever its positions.
        """
        refuse_beyond(self.config, max_length, f"{max_length=}")
        blocks = empty_cache(self.config, batch, max_length, dtype, by_row=True)
        return DecoderCache(blocks, max_length, max_rewind(self.config, max_length))
