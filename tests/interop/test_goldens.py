"""Tiny checkpoints say what transformers said of them; no torch is needed.

`scripts/make_goldens.py` writes the folders.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import interop
from jaxformer.interop import families
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.ops import attention

FOLDER = pathlib.Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_logits_are_those_of_transformers(close, name):
    golden = {key: jnp.asarray(x) for key, x in np.load(FOLDER / name / "io.npz").items()}
    model, params = interop.load(FOLDER / name)
    ids = golden["input_ids"].astype(int)
    real = golden.get("attention_mask", jnp.ones_like(ids)).astype(bool)
    mask = attention.explicit(real[:, None, None])
    args, options = (ids, mask), {"method": "logits"}
    if isinstance(model, Decoder):
        args, options = (ids,), {}
    elif isinstance(model, EncoderDecoder):
        target = golden["decoder_input_ids"].astype(int)
        args, options, real = (ids, target, mask), {}, jnp.ones(target.shape, bool)
    elif "token_type_ids" in golden:
        options["token_types"] = golden["token_type_ids"].astype(int)
    logits = jax.jit(lambda params: model.apply(params, *args, **options))(params)
    close(np.asarray(logits)[real], np.asarray(golden["logits"])[real], name)


def test_every_architecture_has_one():
    configs = [json.loads((path / "config.json").read_text()) for path in FOLDER.iterdir()]
    assert {config["model_type"] for config in configs} == {*families.MODULES}
