"""ESM-2: an encoder of proteins, whose attention says which residues touch."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.layers.linear import Dense
from jaxformer.models.encoder import Encoder, attention_maps
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention, contacts
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Bool, Float, Int, PyTree

_MASKED = 0.15 * 0.8  # share of tokens that were masked in the training of all ESM models


@dataclasses.dataclass(frozen=True)
class ESMConfig(TransformerConfig):
    """Sizes and choices of an ESM.

    Attributes:
        mask_token: Token whose embedding is left out, as by dropout, the others being scaled by
            0.88 over the share that stays; None for no such thing.
    """

    mask_token: int | None = None

    @classmethod
    def esm2(cls, width: int, num_layers: int, num_heads: int) -> "ESMConfig":
        """ESM-2 in some size, for the 33 tokens of `alphabets.protein`."""
        return cls(
            vocab_size=33,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=width // num_heads,
            hidden=4 * width,
            max_length=1026,
            norm="layer",
            activation="gelu",
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            head_bias=True,
            head_transform="gelu",
            pad_token=1,
            mask_token=32,
        )

    @classmethod
    def esm2_8m(cls) -> "ESMConfig":
        """The smallest published one."""
        return cls.esm2(320, 6, 20)

    @classmethod
    def esm2_650m(cls) -> "ESMConfig":
        """The one that most work uses."""
        return cls.esm2(1280, 33, 20)


class ESM(Encoder):
    """An encoder that leaves out masked residues, and a map from attention to contacts.

    Attributes:
        config: Sizes and choices.

    References:
        Lin et al. 2023, "Evolutionary-scale prediction of atomic-level protein structure".
        https://doi.org/10.1126/science.ade2574
        Rao et al. 2021, "Transformer protein language models are unsupervised structure learners".
        https://openreview.net/forum?id=fylclEqgvgd
    """

    config: ESMConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.contact = Dense(1, use_bias=True)

    def seen(
        self, x: Float[Array, "B S E"], tokens: Array, mask: Mask | None
    ) -> Float[Array, "B S E"]:
        """Leaves out what is masked, and makes up for it."""
        config = self.config
        if self.is_initializing():
            self.contact(jnp.zeros((1, config.num_layers * config.num_heads)))
        if config.mask_token is None:
            return x
        masked = tokens == config.mask_token
        lengths = real_tokens(mask, tokens).sum(axis=1)
        share = masked.sum(axis=1) / jnp.maximum(lengths, 1).astype(x.dtype)
        # Where all is masked there is nothing left to scale.
        factor = (1 - _MASKED) / jnp.where(share < 1, 1 - share, 1)
        return jnp.where(masked[..., None], 0, x * factor.astype(x.dtype)[:, None, None])

    def touching(self, maps: Float[Array, "B R R C"]) -> Float[Array, "B R R"]:
        """How probable each contact is, of all layers' and heads' maps, corrected."""
        return jax.nn.sigmoid(self.contact(maps)[..., 0])


def real_tokens(mask: Mask | None, tokens: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Which tokens anyone may look at: all that are no padding."""
    size = tokens.shape[1]
    if mask is None:
        return jnp.ones(tokens.shape, bool)
    return jnp.broadcast_to(mask.dense(size, size).any(axis=(1, 2)), tokens.shape)


def predict_contacts(
    model: ESM,
    variables: PyTree,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"] | None = None,
    *,
    end_token: int = 2,
) -> Float[Array, "B R R"]:
    """Says how probable it is that two residues touch (β carbons within 8 Å).

    Args:
        model: An ESM.
        variables: Its variables.
        tokens: A start token, residues, an end token, padding.
        lengths: Tokens of each row before its padding; all if None.
        end_token: Which the end token is.

    Returns:
        For the S - 2 places after the start token, symmetric; what is said of places at and after
        the end token means nothing.
    """
    mask = None if lengths is None else attention.key_lengths(lengths)
    maps = attention_maps(model, variables, tokens, mask)
    residue = real_tokens(mask, tokens) & (tokens != end_token)
    maps = jnp.where((residue[:, :, None] & residue[:, None])[:, None, None], maps, 0)
    maps = maps[..., 1:-1, 1:-1].reshape(maps.shape[0], -1, *(tokens.shape[1] - 2,) * 2)
    maps = contacts.average_product_correction(contacts.symmetrize(maps))
    found = model.apply(variables, maps.transpose(0, 2, 3, 1), method="touching")
    assert isinstance(found, Array)
    return found
