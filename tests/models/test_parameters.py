"""Paths and shapes of parameters stay what users' checkpoints hold.

    python -m tests.models.test_parameters

writes the files in `tests/models/parameters` anew.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.quantize import FSQ, VectorQuantizer
from jaxformer.models.decoder import Decoder
from jaxformer.models.dino import DINO, DINOConfig
from jaxformer.models.encoder import Encoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.esm import ESM, ESMConfig
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.models.jepa import JEPA, JEPAConfig
from jaxformer.models.mae import MAE, MAEConfig
from jaxformer.models.transformer import TransformerConfig
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.models.vqvae import VQVAE, ConvCoder, ViTCoder, VQVAEConfig

FOLDER = pathlib.Path(__file__).parent / "parameters"
SIZES = {"width": 5, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 2}
EVERYTHING = {"qk_norm": True, "layer_scale": 0.1, "tie_embeddings": False}
TEXT = TransformerConfig(vocab_size=17, hidden=13, **SIZES)
FULL = TransformerConfig(vocab_size=17, hidden=13, **SIZES, **EVERYTHING, scan=True)
BOTH_WAYS = {
    "positions": "learned",
    "max_length": 11,
    "token_types": 3,
    "embed_width": 7,
    "embed_norm": True,
    "first_norm": False,
    "head_transform": "gelu",
    "head_bias": True,
}
WORDS = TransformerConfig(vocab_size=17, hidden=13, **SIZES, **BOTH_WAYS)
PICTURES = ImageGPTConfig(side=6, num_classes=7, width=10, num_layers=2, hidden=13)

PHOTOS = ViTConfig((6, 10), (3, 2), 3, 8, 2, 2, 11, pooler=True, num_classes=7)
DINO_PHOTOS = dataclasses.replace(
    PHOTOS, registers=3, mask_token=True, layer_scale=0.1, key_bias=False, gated=True, scan=True
)
GRIDS = VQVAEConfig((8, 12), 1, 4, ConvCoder(7, 3, 1))
VIT_GRIDS = dataclasses.replace(GRIDS, coder=ViTCoder(8, 1, 2, 11))
WAVES = dataclasses.replace(PHOTOS, positions="sinusoidal")

TOKENS, IMAGES, FEW = jnp.zeros((1, 3), int), jnp.zeros((1, 6, 10, 3)), jnp.zeros((1, 4), int)
MODELS = {
    "decoder": (Decoder(TEXT), [TOKENS]),
    "decoder_full": (Decoder(FULL), [TOKENS]),
    "encoder": (Encoder(TEXT), [TOKENS]),
    "encoder_of_masked_words": (Encoder(WORDS), [TOKENS], "logits"),
    "esm": (ESM(ESMConfig.esm2(12, 2, 3)), [TOKENS], "logits"),
    "encoder_decoder": (EncoderDecoder(TEXT), [TOKENS, TOKENS]),
    "encoder_decoder_full": (EncoderDecoder(FULL), [TOKENS, TOKENS]),
    "image_gpt": (ImageGPT(PICTURES), [TOKENS]),
    "vit": (ViT(PHOTOS), [IMAGES], "logits"),
    "dino": (DINO(DINOConfig(DINO_PHOTOS, 9, 5, 3)), [IMAGES, FEW]),
    "mae": (MAE(MAEConfig.of(WAVES, 12, 1, 3)), [IMAGES, FEW, FEW]),
    "vqvae": (VQVAE(GRIDS, VectorQuantizer(5, 3)), [jnp.zeros((1, 8, 12, 1))]),
    "vqvae_vit": (VQVAE(VIT_GRIDS, FSQ((3, 5))), [jnp.zeros((1, 8, 12, 1))]),
    "jepa": (JEPA(JEPAConfig.of(PHOTOS, 12, 1, 3, positions="learned")), [IMAGES, FEW, FEW]),
}


def listing(name):
    """One line a parameter."""
    model, given, *method = MODELS[name]
    init = functools.partial(model.init, method=method[0] if method else "__call__")
    shapes = jax.eval_shape(init, jax.random.key(0), *given)
    lines = []
    for path, leaf in jax.tree.leaves_with_path(shapes):
        sizes = " × ".join(map(str, leaf.shape))
        lines.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {sizes}\n")
    return "".join(lines)


@pytest.mark.parametrize("name", MODELS)
def test_paths_and_shapes_of_parameters_are_those_on_file(name):
    found, expected = listing(name), (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert found == expected, (
        "renaming a parameter breaks users' checkpoints; if that is meant, write the file anew: "
        "python -m tests.models.test_parameters"
    )


if __name__ == "__main__":
    for model_name in MODELS:
        (FOLDER / f"{model_name}.txt").write_text(listing(model_name), encoding="utf-8")
