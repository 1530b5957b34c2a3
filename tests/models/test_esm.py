"""ESM: masked residues count for nothing, contacts do not see what is no residue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models import esm
from jaxformer.models.encoder import Encoder, attention_maps
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention

V, B, S, PAD, END, MASK = 11, 2, 7, 1, 2, 3
CONFIG = dataclasses.replace(
    esm.ESMConfig.esm2(12, 2, 3), vocab_size=V, hidden=13, mask_token=MASK, pad_token=PAD
)
LENGTHS = jnp.array([S, 5])
TOKENS = jnp.array([[0, 5, 6, 7, 8, 9, 2], [0, 9, 8, 7, 2, 1, 1]])


@pytest.fixture(scope="module")
def variables(draw):
    return draw(esm.ESM(CONFIG), TOKENS, method="logits")


@pytest.fixture(scope="module")
def embedded(variables):
    def run(tokens, mask):
        return esm.ESM(CONFIG).apply(variables, tokens, mask, None, None, method="embedded")

    return run


def test_masked_residues_are_left_out_and_the_rest_makes_up_for_it(embedded, variables):
    table = np.asarray(variables["params"]["embed"]["table"])
    tokens = TOKENS.at[0, 2].set(MASK).at[1, 1].set(MASK)
    x = np.asarray(embedded(tokens, attention.key_lengths(LENGTHS)))
    for row, length in enumerate([S, 5]):
        factor = 0.88 / (1 - 1 / length)
        right = factor * table[np.asarray(tokens[row])] * (tokens[row] != MASK)[:, None]
        np.testing.assert_allclose(x[row, :length], right[:length], rtol=1e-5)


def test_a_text_that_is_all_masks_is_zeros(embedded):
    assert not np.asarray(embedded(jnp.full((1, 4), MASK), None)).any()


def test_without_a_mask_token_it_is_the_encoder(variables):
    config = dataclasses.replace(CONFIG, mask_token=None)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig)}
    params = {k: x for k, x in variables["params"].items() if k != "contact"}
    one = esm.ESM(config).apply(variables, TOKENS)
    other = Encoder(TransformerConfig(**fields)).apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(one, other)


def test_contacts_are_symmetric_and_blind_to_padding(variables):
    model = esm.ESM(CONFIG)
    found = jax.jit(lambda tokens: esm.predict_contacts(model, variables, tokens, LENGTHS))
    contacts = np.asarray(found(TOKENS))
    assert contacts.shape == (B, S - 2, S - 2)
    np.testing.assert_allclose(contacts, contacts.swapaxes(1, 2), atol=1e-6)
    other = np.asarray(found(TOKENS.at[1, 5:].set(6)))
    np.testing.assert_allclose(contacts, other, atol=1e-6)
    assert np.ptp(contacts[0]) > 0.01


def test_maps_of_scanned_layers_are_those_of_unrolled_ones(variables):
    config = dataclasses.replace(CONFIG, scan=True)
    params = dict(variables["params"])
    layers = [params["blocks"][f"layers_{i}"] for i in range(2)]
    params["blocks"] = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    mask = attention.key_lengths(LENGTHS)
    one = attention_maps(esm.ESM(CONFIG), variables, TOKENS, mask)
    other = attention_maps(esm.ESM(config), {"params": params}, TOKENS, mask)
    assert one.shape == (B, 2, 3, S, S)
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(one.sum(-1), 1, atol=1e-6)
    assert not np.asarray(one)[1, ..., 5:].any()


def test_published_sizes():
    shapes = jax.eval_shape(
        lambda: esm.ESM(esm.ESMConfig.esm2_8m()).init(jax.random.key(0), TOKENS, method="logits")
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 7_512_474
    assert esm.ESMConfig.esm2_650m().head_dim == 64
