"""An encoder-decoder: writes one text while reading another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.layers.attention import (
    CrossCache,
    StackCache,
    cached_length,
    rewound,
    select_rows,
)
from jaxformer.layers.embed import Embed
from jaxformer.models.encoder import Encoder
from jaxformer.models.skeleton import Skeleton
from jaxformer.models.transformer import (
    TransformerConfig,
    empty_cache,
    last_of_each,
    max_rewind,
    refuse_beyond,
    refuse_for_encoder_decoder,
)
from jaxformer.ops import attention
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderDecoderCache:
    """What is remembered of each source and of each target so far; rows grow each by itself.

    Attributes:
        blocks: Keys and values of the target, and once and for all those of the source.
        source: Which tokens of the source exist.
        max_length: Tokens that a target has room for.
        max_rewind: Tokens that `rewind` can forget: 15 in layers with a window; None for all.
    """

    blocks: StackCache
    source: Any  # Bool[Array, "B S"], for which JAX puts shapes and axis numbers too
    max_length: int = dataclasses.field(metadata={"static": True})
    max_rewind: int | None = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each target so far."""
        return cached_length(self.blocks)

    def select(self, rows: Int[Array, "R"]) -> "EncoderDecoderCache":
        """Takes rows of the batch, sources and targets, in any order and number."""
        blocks, source = select_rows(self.blocks, rows), jnp.take(self.source, rows, axis=0)
        return dataclasses.replace(self, blocks=blocks, source=source)

    def rewind(self, lengths: Int[Array, "B"]) -> "EncoderDecoderCache":
        """Forgets the targets' tokens from `lengths` on, `max_rewind` at most."""
        return dataclasses.replace(self, blocks=rewound(self.blocks, lengths))


class EncoderDecoder(Skeleton):
    """An encoder, and causal blocks that look at what it says; both share the embedding table.

    For writing, `begin` reads the sources and `step` goes on with the targets:

        cache = model.apply(params, source, mask, max_length=50, method="begin")
        logits, cache = model.apply(params, tokens, cache, method="step")

    Attributes:
        config: Sizes of each half.
        attend: As in all skeletons.
        project: Likewise.
    """

    def setup(self) -> None:
        config = self.config
        refuse_for_encoder_decoder(config)
        self.encoder = Encoder(_first_half(config), self.attend, self.project)
        self.make_parts(config.decoder_vocab_size or 0, causal=True)
        self.blocks = self.make_blocks(_second_half(config), cross=True)

    def table(self) -> Embed:
        """The vectors of the target's tokens."""
        return self.encoder.embed if self.config.decoder_vocab_size is None else self.embed

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

        Raises:
            ValueError: If a text is longer than the table of learned positions.
        """
        context = self.encode(source, source_mask, train=train)
        return self.decode(target, context, source_mask, train=train)

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
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Predicts what follows each token of the target, of which all is known.

        Args:
            target: As for the call.
            context: From `encode`.
            source_mask: As for `encode`.
            train: Turns dropout on; needs an rng named "dropout".
        """
        length = target.shape[1]
        bias = self.bias(length, length) if self.config.positions == "buckets" else None
        x = self.blocks(
            self.embedded(target, jnp.zeros((), jnp.int32)),
            attention.causal(),
            bias=bias,
            context=context,
            context_mask=source_mask,
            train=train,
        )
        return self.predicted(x)

    def begin(
        self,
        source: Int[Array, "B S"],
        source_mask: Mask | None = None,
        *,
        max_length: int,
        dtype: DTypeLike = jnp.float32,
    ) -> EncoderDecoderCache:
        """Reads the sources, and makes a cache for targets of up to `max_length` tokens.

        Args:
            source: The text to read.
            source_mask: Which keys of the source exist, the same for all queries.
            max_length: Of the targets.
            dtype: Of the cache.

        Raises:
            ValueError: If the source is longer than the table of learned positions, or `max_length`
                is more than the config's, whatever its positions.
        """
        config = self.config
        refuse_beyond(config, max_length, f"{max_length=}")
        batch, size = source.shape
        exists = jnp.ones((batch, size), bool)
        if source_mask is not None:
            exists &= source_mask.dense(1, size)[:, 0, 0]
        context = self.encode(source, source_mask)
        empty = empty_cache(_second_half(config), batch, max_length, dtype, by_row=True)
        blocks = CrossCache(empty) if config.scan else tuple(map(CrossCache, empty))  # pyright: ignore[reportArgumentType]
        # A target of no tokens leaves nothing in the cache but the keys and values of the context.
        nothing = jnp.zeros((batch, 0, config.width), context.dtype)
        _, blocks = self.blocks(nothing, attention.causal(), context=context, cache=blocks)
        blocks = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, blocks)
        return EncoderDecoderCache(blocks, exists, max_length, max_rewind(config, max_length))

    def step(
        self,
        tokens: Int[Array, "B T"],
        cache: EncoderDecoderCache,
        counts: Int[Array, "B"] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Float[Array, "B #T V"], EncoderDecoderCache]:
        """Predicts what follows each of the next tokens of the targets.

        Args:
            tokens: What comes after the targets so far, at first their start token.
            cache: From `begin`, or from the last step.
            counts: How many of the T tokens of each row are real; the logits of the others mean
                nothing, and they leave no trace. All if None.
            last: Scores what follows the last real token of each row alone: T is 1 in the logits.
        """
        bias = None
        if self.config.positions == "buckets":
            bias = self.bias(tokens.shape[1], cache.max_length, cache.length)
        x, blocks = self.blocks(
            self.embedded(tokens, cache.length),
            attention.causal(cache.length),
            bias=bias,
            context_mask=attention.explicit(cache.source[:, None, None]),
            cache=cache.blocks,
            counts=counts,
        )
        return self.predicted(last_of_each(x, counts) if last else x), dataclasses.replace(
            cache, blocks=blocks
        )

    def embedded(
        self, tokens: Int[Array, "B T"], offset: Int[Array, ""] | Int[Array, "B"]
    ) -> Float[Array, "B T D"]:
        """What the first block reads of a target whose tokens stand from `offset` on."""
        places = offset.reshape(-1, 1) + jnp.arange(tokens.shape[1])[None]
        return self.placed(self.scaled(tokens), places)


def _first_half(config: TransformerConfig) -> TransformerConfig:
    head = {"tie_embeddings": True, "head_bias": False, "logit_scale": 1.0}
    return dataclasses.replace(config, **head, decoder_layers=None, decoder_vocab_size=None)


def _second_half(config: TransformerConfig) -> TransformerConfig:
    layers = config.decoder_layers or config.num_layers
    return dataclasses.replace(config, num_layers=layers)
