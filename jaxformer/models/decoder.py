"""A decoder-only language model: each token's logits depend on the tokens up to it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.attention import (
    StackCache,
    cached_length,
    rewound,
    select_rows,
)
from jaxformer.layers.embed import Embed, RelativeBias
from jaxformer.layers.linear import Dense
from jaxformer.models.transformer import (
    Means,
    TransformerConfig,
    empty_cache,
    last_of_each,
    max_rewind,
    refuse_for_decoder,
    stack,
)
from jaxformer.ops import attention, linear, positions
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What a decoder remembers of each row; rows grow each by itself.

    Attributes:
        blocks: Keys and values.
        max_length: Tokens that a row has room for.
    """

    blocks: StackCache
    max_length: int = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens so far."""
        return cached_length(self.blocks)

    @property
    def max_rewind(self) -> int | None:
        """Tokens that `rewind` can forget: 15 in layers with a window; None for all."""
        return max_rewind(self.blocks, self.max_length)

    def select(self, rows: Int[Array, "R"]) -> "DecoderCache":
        """Takes rows of the batch, in any order and number."""
        return dataclasses.replace(self, blocks=select_rows(self.blocks, rows))

    def rewind(self, lengths: Int[Array, "B"]) -> "DecoderCache":
        """Forgets the tokens from `lengths` on, `max_rewind` at most."""
        return dataclasses.replace(self, blocks=rewound(self.blocks, lengths))


class Decoder(nn.Module):
    """Embedding, causal blocks, norm, logits.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`, such as `flash.attend`.
        project: The product of all linear maps of the blocks.
    """

    config: TransformerConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def setup(self) -> None:
        config = self.config
        refuse_for_decoder(config)
        self.embed = Embed(config.vocab_size, config.width)
        if config.positions == "learned":
            rows = config.max_length + config.position_offset
            self.places = Embed(rows, config.width)
        if config.positions == "buckets":
            self.bias = RelativeBias(
                config.num_heads, config.num_buckets, config.max_distance, bidirectional=False
            )
        if config.embed_norm:
            self.norm_in = config.make_norm()()
        self.blocks = stack(
            config, cross=False, name="blocks", means=Means(self.attend, self.project)
        )
        if config.final_norm:
            self.norm = config.make_norm()()
        if not config.tie_embeddings:
            self.head = Dense(config.vocab_size, config.head_bias)

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
            counts: With a cache, how many of the T tokens of each row are real; the logits of the
                others mean nothing, and they leave no trace. All if None.
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
            return self.logits(last_of_each(x, None) if last else x)
        x, blocks = self.blocks(
            x,
            mask,
            bias=bias,
            cache=cache.blocks,
            positions=positions,
            counts=counts,
            train=train,
        )
        return self.logits(last_of_each(x, counts) if last else x), dataclasses.replace(
            cache, blocks=blocks
        )

    def embedded(
        self, tokens: Array, cache: DecoderCache | None, places: Array | None
    ) -> Float[Array, "B T D"]:
        """What the first block reads."""
        config, length = self.config, tokens.shape[1]
        x = self.embed(tokens)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        sinusoidal = config.positions in ("sinusoidal", "sinusoidal_halves")
        if places is None:
            places = jnp.arange(length)
            if cache is not None:
                places = cache.length[:, None] + places[None]
        if config.positions == "learned":
            if length > config.max_length:
                raise ValueError(f"T={length} exceeds the {config.max_length} learned positions.")
            learned = self.places(places + config.position_offset)
            x = x + (learned if learned.ndim == 3 else learned[None])
        elif sinusoidal:
            halves = config.positions == "sinusoidal_halves"
            waves = positions.sinusoidal(places, config.width, halves=halves, dtype=x.dtype)
            x = x + (waves if waves.ndim == 3 else waves[None])
        return self.norm_in(x) if config.embed_norm else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores the next token from what the last block wrote."""
        config = self.config
        if config.final_norm:
            x = self.norm(x)
            self.sow("intermediates", "normed", x)
        if config.logit_scale != 1.0:
            x = x * jnp.asarray(config.logit_scale, x.dtype)
        logits = self.embed.logits(x) if config.tie_embeddings else self.head(x)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits

    @nn.nowrap
    def empty_cache(
        self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32
    ) -> DecoderCache:
        """Makes a cache for `batch` rows of up to `max_length` tokens.

        Raises:
            ValueError: If that is more than the table of learned positions has.
        """
        bound = self.config.max_length
        if bound and max_length > bound:
            raise ValueError(f"max_length={max_length} exceeds the model's {bound} positions.")
        blocks = empty_cache(self.config, batch, max_length, dtype, by_row=True)
        return DecoderCache(blocks, max_length)
