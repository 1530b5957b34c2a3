"""Paths and shapes of parameters stay what users' checkpoints hold.

    python -m tests.models.test_parameters

writes the files in `tests/models/parameters` anew.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder import Encoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.esm import ESM, ESMConfig
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.models.transformer import TransformerConfig

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

MODELS = {
    "decoder": (Decoder(TEXT), 1),
    "decoder_full": (Decoder(FULL), 1),
    "encoder": (Encoder(TEXT), 1),
    "encoder_of_masked_words": (Encoder(WORDS), 1, "logits"),
    "esm": (ESM(ESMConfig.esm2(12, 2, 3)), 1, "logits"),
    "encoder_decoder": (EncoderDecoder(TEXT), 2),
    "encoder_decoder_full": (EncoderDecoder(FULL), 2),
    "image_gpt": (ImageGPT(PICTURES), 1),
}


def listing(name):
    """One line a parameter."""
    model, texts, *method = MODELS[name]
    tokens = jnp.zeros((1, 3), int)
    init = functools.partial(model.init, method=method[0] if method else "__call__")
    shapes = jax.eval_shape(init, jax.random.key(0), *[tokens] * texts)
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
