"""An encoder: each token's vector depends on the whole text."""

from flax import linen as nn

from jaxformer.layers.embed import Embed
from jaxformer.layers.linear import Dense
from jaxformer.layers.norms import RMSNorm
from jaxformer.models.transformer import TransformerConfig, stack
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Float, Int


class Encoder(nn.Module):
    """Embedding, blocks that look both ways, norm.

    Attributes:
        config: Sizes; `tie_embeddings` says whether `logits` uses the embedding table. Without it
            the head's parameters appear where the model is initialised with `method="logits"`.
    """

    config: TransformerConfig

    def setup(self) -> None:
        self.embed = Embed(self.config.vocab_size, self.config.width)
        self.blocks = stack(self.config, cross=False, name="blocks")
        self.norm = RMSNorm()
        if not self.config.tie_embeddings:
            self.head = Dense(self.config.vocab_size)

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Encodes each token in its context.

        Args:
            tokens: The text.
            mask: Who may look, such as `key_lengths` where rows are padded; all at all if None.
            train: Turns dropout on; needs an rng named "dropout".
        """
        return self.norm(self.blocks(self.embed(tokens), mask, train=train))

    def logits(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, *, train: bool = False
    ) -> Float[Array, "B S V"]:
        """Scores every token at every position, for masked-token training."""
        x = self(tokens, mask, train=train)
        return self.embed.logits(x) if self.config.tie_embeddings else self.head(x)
