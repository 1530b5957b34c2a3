"""The encoder-decoder: reads all of the source, writes the target without seeing its future."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.layers.stack import stack_parameters
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention

V, B, S, T = 11, 3, 5, 4
CONFIG = TransformerConfig(
    V, 12, 2, num_heads=4, num_kv_heads=2, head_dim=4, hidden=7, tie_embeddings=False
)
RANDOM = np.random.default_rng(0)
SOURCE = jnp.asarray(RANDOM.integers(0, V, (B, S)))
TARGET = jnp.asarray(RANDOM.integers(0, V, (B, T)))
LENGTHS = jnp.array([5, 3, 1])
MODEL = EncoderDecoder(CONFIG)


@pytest.fixture(scope="module")
def variables(draw):
    return draw(MODEL, SOURCE, TARGET)


@pytest.fixture(scope="module")
def logits(variables):
    mask = attention.key_lengths(LENGTHS)
    return jax.jit(lambda source: MODEL.apply(variables, source, TARGET, mask))


def test_no_token_sees_its_future(variables):
    parameters = variables["params"]
    context = jnp.asarray(RANDOM.standard_normal((1, S, CONFIG.width)), jnp.float32)

    def logits_of(rows):
        # Token t is looked up in row t of the table, so the rows are what the sequence holds.
        table = parameters["encoder"]["embed"]["table"].at[:T].set(rows)
        encoder = parameters["encoder"] | {"embed": {"table": table}}
        moved = {"params": parameters | {"encoder": encoder}}
        return MODEL.apply(moved, jnp.arange(T)[None], context, method="decode")[0]

    testing.assert_causal(logits_of, parameters["encoder"]["embed"]["table"][:T])


def test_the_target_sees_all_of_the_source_but_its_padding(logits):
    expected = np.asarray(logits(SOURCE))
    for place in (0, S - 1):
        moved = SOURCE.at[:, place].set((SOURCE[:, place] + 1) % V)
        changed = np.abs(logits(moved) - expected).max((1, 2)) > 1e-4
        assert changed.tolist() == [place < length for length in LENGTHS.tolist()]


@pytest.mark.parametrize("scan", [False, True])
def test_cached_logits_are_the_uncached_ones(variables, logits, scan):
    model = EncoderDecoder(dataclasses.replace(CONFIG, scan=scan))
    if scan:
        parameters = variables["params"]
        encoder = parameters["encoder"]
        encoder = encoder | {"blocks": stack_parameters(encoder["blocks"])}
        blocks = stack_parameters(parameters["blocks"])
        variables = {"params": parameters | {"encoder": encoder, "blocks": blocks}}
    mask = attention.key_lengths(LENGTHS)
    encode = jax.jit(lambda: model.apply(variables, SOURCE, mask, method="encode"))
    step = jax.jit(
        lambda context, tokens, cache: model.apply(
            variables, tokens, context, mask, cache, method="decode"
        )
    )
    context, cache, found = encode(), model.empty_cache(B, T), []
    for part in (TARGET[:, :2], TARGET[:, 2:3], TARGET[:, 3:]):
        new, cache = step(context, part, cache)
        found.append(new)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), logits(SOURCE), atol=1e-5)
    more, _ = step(context, TARGET[:, :1], cache)
    assert np.isnan(more).all()  # the cache is full


def test_tied_embeddings_serve_source_target_and_logits(draw):
    model = EncoderDecoder(dataclasses.replace(CONFIG, tie_embeddings=True))
    shapes = jax.eval_shape(model.init, jax.random.key(0), SOURCE, TARGET)
    with_v = [a.shape for a in jax.tree.leaves(shapes) if V in a.shape]
    assert with_v == [(V, CONFIG.width)]


def test_training_drops_in_both_halves(variables):
    model = EncoderDecoder(dataclasses.replace(CONFIG, dropout=0.5))
    context = jnp.zeros((B, S, CONFIG.width))
    # Two branches a block of the encoder and three of the decoder, of two blocks each.
    for args, method, branches in (
        ((SOURCE,), "encode", 4),
        ((TARGET, context), "decode", 6),
        ((SOURCE, TARGET), "__call__", 10),
    ):
        for train in (False, True):
            run = functools.partial(model.apply, method=method, train=train)
            written = jax.make_jaxpr(run)(variables, *args, rngs={"dropout": jax.random.key(0)})
            assert str(written).count("name=_bernoulli") == (branches if train else 0)
