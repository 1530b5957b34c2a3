"""What decoder, encoder and encoder-decoder share: how tokens come in, and how they are scored."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.embed import Embed, RelativeBias
from jaxformer.layers.linear import Dense
from jaxformer.layers.stack import Stack
from jaxformer.models.transformer import Means, TransformerConfig, refuse_beyond, stack
from jaxformer.ops import attention, linear, positions
from jaxformer.ops.attention import Mask, blocked, flash
from jaxformer.typing import Array, Float, Int

_IN_BLOCKS = 1024  # tokens of the longest text whose weights are kept for the backward pass


def fastest(config: TransformerConfig, *, causal: bool) -> Means:
    """What trains a model of this config fastest on the platform at hand: no forward mode.

    On a CPU a text of a few hundred tokens is attended to in blocks, which keep three quarters of
    its weights for the backward pass, where causality is all that attention knows of. A long one
    is attended to in memory linear in its length.

        model = Decoder(config, *fastest(config, causal=True))
    """
    if flash.platform() != "cpu":
        return Means(flash.attend)
    biased = config.positions in ("alibi", "buckets") or config.softcap is not None or config.sinks
    blocks = causal and not (biased or config.windows or config.latent)
    return Means(attend_causal if blocks else flash.attend, linear.project_input_first)


def attend_causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    mask: Mask | None = None,
    **options: Any,
) -> Float[Array, "B T N Hv"]:
    """Mixes the values of each position's past: in blocks if the text is short, else by flash.

    It means what `blocked.attend_causal` means, and honours no more.
    """
    attend = blocked.attend_causal if q.shape[1] <= _IN_BLOCKS else flash.attend
    return attend(q, k, v, mask, **options)


class Skeleton(nn.Module):
    """Embedding, positions, blocks, norm and head by a config; a base of models.

    Attributes:
        config: Sizes and choices.
        attend: Any function with the signature of `ops.attention.attend`, such as `flash.attend`.
        project: The product of the blocks' linear maps, but of experts and their routers, and of
            those from latents to keys and values.
    """

    config: TransformerConfig
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    def make_parts(self, vocab_size: int, *, causal: bool) -> None:
        """Makes what comes before and after the blocks; for `setup`.

        Args:
            vocab_size: V; 0 for no table of its own.
            causal: Whether nobody looks ahead, so that distances have one sign.
        """
        config = self.config
        width = config.embed_width or config.width
        if vocab_size:
            self.embed = Embed(vocab_size, width)
        if config.positions == "learned":
            self.places = Embed(config.max_length + config.position_offset, width)
        if config.positions == "buckets":
            sizes = (config.num_heads, config.num_buckets, config.max_distance)
            self.bias = RelativeBias(*sizes, bidirectional=not causal)
        if config.embed_norm:
            self.norm_in = config.make_norm()()
        if config.final_norm:
            self.norm = config.make_norm()()
        if not config.tie_embeddings:
            self.head = Dense(vocab_size or config.vocab_size, config.head_bias)
        elif config.head_bias:
            size = (vocab_size or config.vocab_size,)
            self.head_bias = self.param("head_bias", nn.initializers.zeros, size)

    def make_blocks(self, config: TransformerConfig, *, cross: bool) -> Stack:
        """Makes the blocks, which compute by the model's own means."""
        means = Means(self.attend, self.project)
        return stack(config, cross=cross, name="blocks", means=means)

    def table(self) -> Embed:
        """The vectors of the tokens."""
        return self.embed

    def scaled(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The vectors of these tokens, before anything is added."""
        x, scale = self.table()(tokens), self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def placed(self, x: Float[Array, "B T E"], places: Int[Array, "#B T"]) -> Float[Array, "B T E"]:
        """Adds what the config adds for the tokens' places, and normalises where the config does.

        Raises:
            ValueError: If the text is longer than the table of learned positions.
        """
        config, length = self.config, x.shape[1]
        if config.positions == "learned":
            refuse_beyond(config, length, f"a text of {length} tokens")
            x = x + self.places(places + config.position_offset).astype(x.dtype)
        if config.positions in ("sinusoidal", "sinusoidal_halves"):
            halves = config.positions == "sinusoidal_halves"
            x = x + positions.sinusoidal(places, x.shape[-1], halves=halves, dtype=x.dtype)
        return self.norm_in(x) if config.embed_norm else x

    def normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalises what the last block wrote, where the config does."""
        if self.config.final_norm:
            x = self.norm(x)
            self.sow("intermediates", "normed", x)
        return x

    def predicted(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores the next token from what the last block wrote."""
        return self.scored(self.normed(x))

    def scored(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Scores every token."""
        config = self.config
        if config.logit_scale != 1.0:
            x = x * jnp.asarray(config.logit_scale, x.dtype)
        logits: Any = self.table().logits(x) if config.tie_embeddings else self.head(x)
        if config.tie_embeddings and config.head_bias:
            logits = logits + self.head_bias.astype(x.dtype)[None, None]
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits
