"""Marian, the models of OPUS-MT: BART with sinusoids in place of learned positions."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformer.interop import bart
from jaxformer.interop.families import Family, texts
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import Tensors
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import positions


def _read(s: Settings) -> TransformerConfig:
    found = bart.sizes(s)
    s.only("normalize_embedding", False)
    s.only("static_position_embeddings", True)
    s.take("extra_pos_embeddings", None)
    shared, vocab_size = s.take("share_encoder_decoder_embeddings", True), found["vocab_size"]
    other = s.take("decoder_vocab_size", vocab_size)
    if shared and other != vocab_size:
        raise ValueError(
            f"{s.where}: decoder_vocab_size={other} is not supported beside vocab_size="
            f"{vocab_size} where share_encoder_decoder_embeddings=True."
        )
    one_table = shared and found["tie_embeddings"]
    return TransformerConfig(
        **found,
        decoder_vocab_size=None if one_table else other,
        positions="sinusoidal_halves",
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    other = config.decoder_vocab_size
    return bart.written_sizes(config) | {
        "share_encoder_decoder_embeddings": other is None,
        "decoder_vocab_size": other or config.vocab_size,
        "pad_token_id": None,  # else one of 58,101 tokens
    }


def _amend(config: TransformerConfig, files: Tensors) -> TransformerConfig:
    """Refuses positions that are other waves than ours."""
    for name in sorted(files.names()):
        if name.endswith("embed_positions.weight"):
            table = files.read(name)
            waves = positions.sinusoidal(jnp.arange(len(table)), config.width, halves=True)
            if table.shape != waves.shape or np.abs(table - waves).max() > 1e-4:
                raise ValueError(f"{files.place(name)}: {name} holds no sines before cosines.")
    return config


FAMILIES = {
    "marian": Family(
        "marian",
        "MarianMTModel",
        EncoderDecoder,
        _read,
        _write,
        bart.rules,
        example=texts(2),
        tied=(
            *((name, "model.shared.weight") for name in bart.TABLES),
            ("lm_head.weight", "model.decoder.embed_tokens.weight"),
        ),
        unused=(r"(model\.)?shared\.weight", r".*embed_positions\.weight"),
        amend=_amend,
    )
}
