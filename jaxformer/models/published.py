"""Configs of models that were published, in any size."""

from jaxformer.models.transformer import TransformerConfig


def bert(
    vocab_size: int = 30522,
    width: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    *,
    max_length: int = 512,
    token_types: int = 2,
) -> TransformerConfig:
    """BERT, for `models.encoder.Encoder`; the defaults are those of the base model, uncased.

    References:
        Devlin et al. 2019, section 3. https://arxiv.org/abs/1810.04805
    """
    return TransformerConfig(
        vocab_size,
        width,
        num_layers,
        num_heads,
        num_heads,
        width // num_heads,
        4 * width,
        norm="layer",
        epsilon=1e-12,
        order="post",
        final_norm=False,
        positions="learned",
        max_length=max_length,
        token_types=token_types,
        embed_norm=True,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        head_transform="gelu",
        pooler=False,
    )
