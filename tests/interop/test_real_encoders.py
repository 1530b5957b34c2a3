"""Whole checkpoints of encoders say what they said where they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import interop
from jaxformer.models import esm
from jaxformer.ops import attention


@pytest.fixture
def folder(real_data, request):
    found = real_data / request.param
    if not found.is_dir():
        pytest.skip(f"{found} is not there")
    return found


@pytest.mark.parametrize("folder", ["pretrained/rxnmapper_albert"], indirect=True)
def test_the_albert_of_rxnmapper_refills_its_masked_atoms(folder, close):
    golden = np.load(folder / "golden.npz")
    model, params = interop.load(folder)
    ids, real = golden["input_ids"], golden["attention_mask"].astype(bool)

    @jax.jit
    def run(params):
        mask = attention.key_lengths(jnp.asarray(real.sum(1)))
        options = {"method": "logits", "mutable": ["intermediates", "attention"]}
        return model.apply(params, jnp.asarray(ids), mask, **options)

    logits, state = run(params)
    logits, vectors = np.asarray(logits), state["intermediates"]["blocks"]["layers_0"]["stream"]
    maps = state["attention"]["blocks"]["layers_0"]["attention"]["inner"]["weights"]
    assert len(vectors) == len(maps) == 12
    close(logits[real], golden["logits"][real], "logits")
    close(np.asarray(vectors[-1])[real], golden["last_hidden_state"][real], "vectors")
    sizes = [np.abs(np.asarray(x)).mean() for x in vectors]
    np.testing.assert_allclose(sizes, golden["hidden_mean_abs"][1:], rtol=1e-5)
    close(np.asarray(maps[10][:, 5])[real], golden["attn_layer10_head5"][real], "attention")
    assert logits[ids == 14].argmax(-1).tolist() == [23, 19]  # "N" and "."


@pytest.mark.parametrize("folder", ["hf_tiny/bert", "hf_tiny/esm2"], indirect=True)
def test_small_checkpoints_of_transformers(folder, close):
    golden = dict(np.load(folder / "io.npz"))
    model, params = interop.load(folder)
    ids, real = jnp.asarray(golden["input_ids"]), golden["attention_mask"].astype(bool)
    lengths = jnp.asarray(real.sum(1))
    kinds = {}
    if "token_type_ids" in golden:
        kinds["token_types"] = jnp.asarray(golden["token_type_ids"])

    @jax.jit
    def run(params):
        mask = attention.key_lengths(lengths)
        options = {"method": "logits", "mutable": ["intermediates"]}
        return model.apply(params, ids, mask, **kinds, **options)

    logits, state = run(params)
    close(np.asarray(logits)[real], golden["logits"][real], "logits")
    for i in range(model.config.num_layers - model.config.final_norm):
        (x,) = state["intermediates"]["blocks"][f"layers_{i}"]["stream"]
        close(np.asarray(x)[real], golden[f"hidden{i + 1}"][real], f"hidden {i}")
    if isinstance(model, esm.ESM):
        found = jax.jit(lambda p: esm.predict_contacts(model, p, ids, lengths))(params)
        close(found, golden["contacts"], "contacts")
