"""An encoder: each token's vector depends on the whole text."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.embed import Embed
from jaxformer.layers.linear import Dense
from jaxformer.models.skeleton import Skeleton
from jaxformer.models.transformer import ACTIVATIONS, refuse_for_encoder
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Float, Int, PyTree


class Encoder(Skeleton):
    """Embedding, blocks that look both ways, norm; vectors, one for the text, or logits.

    The parameters of a head appear where the model is initialised with that head's method:
    `method="logits"` or `method="pooled"`.

    Attributes:
        config: Sizes and choices; `tie_embeddings` says whether `logits` uses the embedding table.
        attend: As in all skeletons.
        project: Likewise.

    References:
        Devlin et al. 2019, "BERT". https://arxiv.org/abs/1810.04805
        Lan et al. 2020, "ALBERT", section 3.1. https://arxiv.org/abs/1909.11942
    """

    def setup(self) -> None:
        config = self.config
        refuse_for_encoder(config)
        if config.positions == "alibi":
            raise NotImplementedError("the slopes of ALiBi are for looking back alone.")
        self.make_parts(config.vocab_size, causal=False)
        width = config.embed_width or config.width
        if config.token_types:
            self.types = Embed(config.token_types, width)
        if config.embed_width is not None:
            self.widen = Dense(config.width, use_bias=True)
        self.blocks = self.make_blocks(config, cross=False)
        if config.pooler:
            self.pool = Dense(config.width, use_bias=True)
        if config.head_transform is not None:
            self.transform = Dense(width, config.mlp_bias)
            self.norm_out = config.make_norm()()

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Mask | None = None,
        *,
        token_types: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | Int[Array, "S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """Encodes each token in its context.

        Args:
            tokens: The text.
            mask: Who may look, such as `key_lengths` where rows are padded; all at all if None.
            token_types: Kind of each token, where the config has kinds; 0 if None.
            positions: Place of each token; counted from 0 if None, and where the config names a
                `pad_token`, over the others.
            train: Turns dropout on; needs an rng named "dropout".

        Raises:
            ValueError: If the text is longer than the table of learned positions, or kinds are
                given that the config does not have.
        """
        x = self.embedded(tokens, mask, token_types, positions)
        bias = None
        if self.config.positions == "buckets":
            bias = self.bias(x.shape[1], x.shape[1])
        return self.normed(self.blocks(x, mask, bias=bias, positions=positions, train=train))

    def pooled(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, **kwargs: Any
    ) -> Float[Array, "B D"]:
        """Encodes each text as one vector: a map and tanh of its first token's vector.

        Raises:
            ValueError: If the config has no pooler.
        """
        if not self.config.pooler:
            raise ValueError("the config has no pooler.")
        return jnp.tanh(self.pool(self(tokens, mask, **kwargs)[:, 0]))

    def logits(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, **kwargs: Any
    ) -> Float[Array, "B S V"]:
        """Scores every token at every position, for masked-token training."""
        config = self.config
        x = self(tokens, mask, **kwargs)
        if config.head_transform is not None:
            x = self.norm_out(ACTIVATIONS[config.head_transform](self.transform(x)))
        return self.scored(x)

    def embedded(
        self, tokens: Array, mask: Mask | None, token_types: Array | None, places: Array | None
    ) -> Float[Array, "B S D"]:
        """What the first block reads."""
        config = self.config
        x = self.seen(self.scaled(tokens), tokens, mask)
        if config.token_types:
            x = x + self.types(jnp.zeros_like(tokens) if token_types is None else token_types)
        elif token_types is not None:
            raise ValueError("token_types are given, but the config has none.")
        if places is None:
            places = jnp.arange(tokens.shape[1])
            if config.pad_token is not None:
                real = tokens != config.pad_token
                places = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1)
        x = self.placed(x, places.reshape(-1, tokens.shape[1]))
        return x if config.embed_width is None else self.widen(x)

    def seen(
        self, x: Float[Array, "B S E"], tokens: Array, mask: Mask | None
    ) -> Float[Array, "B S E"]:
        """What becomes of the tokens' vectors before anything is added to them: nothing here."""
        return x


def attention_maps(
    model: nn.Module, variables: PyTree, *args: Any, **kwargs: Any
) -> Float[Array, "B L N S S"]:
    """Draws who looks at whom and how much, in each layer and head; S² numbers for each.

    Args:
        model: An encoder of texts or of images.
        variables: Its variables.
        *args: What `model` takes: tokens or images, a mask; likewise keywords.

    Returns:
        `maps[b, l, n, t]` are the weights with which token t reads all others.
    """
    found: Any = model.apply(variables, *args, mutable=["attention"], **kwargs)
    blocks = found[1]["attention"]["blocks"]
    if model.config.scan:
        return jnp.moveaxis(blocks["layers"]["attention"]["inner"]["weights"][0], 0, 1)
    names = [f"layers_{i}" for i in range(len(blocks))]
    maps = [x for name in names for x in blocks[name]["attention"]["inner"]["weights"]]
    return jnp.stack(maps, axis=1)
