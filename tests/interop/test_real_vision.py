"""Whole checkpoints of models of images say what they said where they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import interop
from jaxformer.ops import losses, patches, reconstruction


@pytest.fixture
def golden(real_data, request):
    """Model, parameters, images with channels last, and what was said of them."""
    folder = real_data / "hf_tiny" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    found = dict(np.load(folder / "io.npz"))
    images = jnp.asarray(np.moveaxis(found["pixel_values"], 1, -1))
    return *interop.load(folder), images, found


@pytest.mark.parametrize("golden", ["vit"], indirect=True)
def test_a_small_vit_of_transformers(golden, close):
    model, params, images, found = golden

    @jax.jit
    def run(params):
        logits, state = model.apply(params, images, method="logits", mutable=["intermediates"])
        blocks = state["intermediates"]["blocks"]
        return logits, [x for i in range(len(blocks)) for x in blocks[f"layers_{i}"]["stream"]]

    logits, stream = run(params)
    close(logits, found["logits"], "logits")
    assert len(stream) == 3
    for i, x in enumerate(stream):
        close(x, found[f"hidden{i + 1}"], f"hidden {i + 1}")


@pytest.mark.parametrize("golden", ["vit_mae"], indirect=True)
def test_a_small_masked_autoencoder_of_transformers(golden, close):
    model, params, images, found = golden
    keep, hide = np.split(found["noise"].argsort(axis=1), [4], axis=1)

    @jax.jit
    def run(params, keep, hide):
        told = model.apply(params, images, keep, hide)
        errors = reconstruction.squared_error(told, patches.patchify(images, (4, 4)))
        return told, losses.masked_mean(errors, jnp.asarray(found["mask"]) > 0)

    told, loss = run(params, keep, hide)
    close(told, found["logits"], "pixels")
    close(loss, found["loss"][0], "loss")
