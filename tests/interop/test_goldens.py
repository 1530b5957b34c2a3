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
from jaxformer.commands import inspect
from jaxformer.interop import families
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.jepa import JEPA
from jaxformer.models.mae import MAE
from jaxformer.ops import attention

FOLDER = pathlib.Path(__file__).parent / "goldens"


GOLDENS = sorted(path.name for path in FOLDER.iterdir())
OF_IMAGES = [x for x in GOLDENS if "pixel" in " ".join(np.load(FOLDER / x / "io.npz"))]


@pytest.mark.parametrize("name", [x for x in GOLDENS if x not in OF_IMAGES])
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


@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_is_said_of_images_is_that_of_transformers(close, name):
    golden = dict(np.load(FOLDER / name / "io.npz"))
    model, params = interop.load(FOLDER / name)
    (pixels,) = (x for key, x in golden.items() if key.startswith("pixel_values"))
    images = jnp.asarray(np.moveaxis(pixels, -3, -1))

    def said(params):
        if isinstance(model, MAE):
            keep, hide = jnp.split(golden["noise"].argsort(axis=1), [2], axis=1)
            return {"logits": model.apply(params, images, keep, hide)}
        if isinstance(model, JEPA):
            keep, targets = (jnp.asarray(golden[f"{x}_mask"], int) for x in ("context", "target"))
            seen = model.apply(params, images, method="encode")
            chosen = jnp.take_along_axis(seen, keep[..., None], axis=1)
            told = model.apply(params, chosen, keep, targets, which=1, method="predict")
            return {"last_hidden_state": seen, "predicted": told}
        if model.config.num_classes:
            return {"logits": model.apply(params, images, method="logits")}
        return {"last_hidden_state": model.apply(params, images)}

    for key, x in jax.jit(said)(params).items():
        close(x, golden[key], f"{name}: {key}")


@pytest.mark.parametrize("name", GOLDENS)
def test_inspect_counts_the_parameters_that_are_loaded(name):
    _, params = interop.load(FOLDER / name)
    found = inspect.report(FOLDER / name)
    assert found["parameters"]["total"] == sum(x.size for x in jax.tree.leaves(params))


def test_every_architecture_has_one():
    configs = [json.loads((path / "config.json").read_text()) for path in FOLDER.iterdir()]
    assert {config["model_type"] for config in configs} == {*families.MODULES}
