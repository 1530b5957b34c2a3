"""The encoder-decoder: reads all of the source, writes the target without seeing its future."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import LatentConfig, TransformerConfig
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


BUCKETS = dataclasses.replace(
    CONFIG, positions="buckets", num_buckets=4, max_distance=7, decoder_layers=1
)
WRITERS = {
    "unrolled": CONFIG,
    "scanned": dataclasses.replace(CONFIG, scan=True, positions="buckets", num_buckets=4),
    "buckets": BUCKETS,
    "learned": dataclasses.replace(
        CONFIG, positions="learned", max_length=8, qk_norm=True, decoder_vocab_size=13
    ),
    "windows": dataclasses.replace(CONFIG, windows=(2, None)),
    "sinusoidal": dataclasses.replace(CONFIG, positions="sinusoidal_halves", order="post"),
    "latent": dataclasses.replace(CONFIG, latent=LatentConfig(4, None, 3, 5)),
}


@pytest.fixture(scope="module", params=WRITERS)
def writer(request, draw):
    """A model, its variables, all logits, and its begin and step."""
    model = EncoderDecoder(WRITERS[request.param])
    variables = draw(model, SOURCE, TARGET)
    mask = attention.key_lengths(LENGTHS)
    whole = jax.jit(model.apply)(variables, SOURCE, TARGET, mask)
    begin = functools.partial(model.apply, max_length=4, method="begin")
    step = jax.jit(functools.partial(model.apply, variables, method="step"))
    return np.asarray(whole), jax.jit(begin)(variables, SOURCE, mask), step


def test_cached_logits_are_the_uncached_ones_and_rows_grow_each_by_itself(writer):
    whole, cache, step = writer
    assert (cache.max_length, cache.length.tolist()) == (4, [0, 0, 0])
    for counts in ([2, 1, 0], [1, 2, 2], [1, 1, 2]):
        places = np.asarray(cache.length)[:, None] + np.arange(2)
        new = np.take_along_axis(np.asarray(TARGET), np.minimum(places, T - 1), axis=1)
        logits, cache = step(new, cache, jnp.array(counts))
        for row, count in enumerate(counts):
            expected = whole[row, places[row, :count]]
            np.testing.assert_allclose(logits[row, :count], expected, atol=1e-5)
    assert cache.length.tolist() == [4, 4, 4]
    logits, _ = step(TARGET[:, :2], cache, jnp.array([1, 0, 0]))
    assert np.isnan(logits[0]).all()  # its cache was full


def test_the_last_logits_are_those_of_each_rows_last_real_token(variables):
    cache = MODEL.apply(variables, SOURCE, max_length=T, method="begin")
    step = jax.jit(functools.partial(MODEL.apply, method="step"), static_argnames="last")
    for counts in (None, jnp.array([1, 4, 2])):
        whole, _ = step(variables, TARGET, cache, counts)
        found, _ = step(variables, TARGET, cache, counts, last=True)
        at = jnp.full(B, T - 1) if counts is None else counts - 1
        np.testing.assert_allclose(found[:, 0], whole[jnp.arange(B), at], atol=1e-5)


def test_rows_are_selected_and_rewound_with_their_sources(writer):
    whole, cache, step = writer
    _, cache = step(TARGET[:, :2], cache, jnp.array([2, 2, 1]))
    rows, lengths = jnp.array([2, 0, 0]), jnp.array([1, 1, 0])
    cache = cache.select(rows).rewind(lengths)
    assert cache.length.tolist() == lengths.tolist()
    new = TARGET[rows[:, None], lengths[:, None] + jnp.arange(2)[None]]
    logits, cache = step(new, cache, jnp.array([2, 2, 2]))
    for i in range(2):
        np.testing.assert_allclose(logits[:, i], whole[rows, lengths + i], atol=1e-5)


def test_the_keys_and_values_of_the_source_are_made_once(draw):
    variables = draw(MODEL, SOURCE, TARGET)
    begin = functools.partial(MODEL.apply, max_length=7, method="begin")
    cache = jax.eval_shape(begin, variables, SOURCE)
    step = functools.partial(MODEL.apply, method="step")
    written = jax.make_jaxpr(step)(variables, TARGET[:, :1], cache)
    dots = [eqn for eqn in written.eqns if eqn.primitive.name == "dot_general"]
    assert not any(eqn.invars[0].aval.shape == (B, S, CONFIG.width) for eqn in dots)


def test_either_half_has_its_number_of_layers_and_its_vocabulary():
    config = dataclasses.replace(CONFIG, decoder_layers=1, decoder_vocab_size=13, head_bias=True)
    for tied in (False, True):
        model = EncoderDecoder(dataclasses.replace(config, tie_embeddings=tied))
        shapes = jax.eval_shape(model.init, jax.random.key(0), SOURCE, TARGET)["params"]
        assert {*shapes["encoder"]["blocks"]} == {"layers_0", "layers_1"}
        assert {*shapes["blocks"]} == {"layers_0"}
        assert {*shapes["encoder"]} == {"embed", "blocks", "norm"}
        assert shapes["encoder"]["embed"]["table"].shape[0] == V
        assert shapes["embed"]["table"].shape[0] == 13
        bias = shapes["head_bias"] if tied else shapes["head"]["bias"]
        assert bias.shape == (13,)


@pytest.mark.parametrize(
    ("field", "value"), [("token_types", 2), ("pooler", True), ("embed_width", 2)]
)
def test_what_encoders_alone_know_is_refused(field, value):
    model = EncoderDecoder(dataclasses.replace(CONFIG, **{field: value}))
    with pytest.raises(NotImplementedError, match=f"an encoder-decoder knows no {field}"):
        jax.eval_shape(model.init, jax.random.key(0), SOURCE, TARGET)


def test_targets_longer_than_the_positions_are_refused(draw):
    model = EncoderDecoder(WRITERS["learned"])
    variables = draw(model, SOURCE, TARGET)
    with pytest.raises(ValueError, match="max_length=9 exceeds the 8"):
        model.apply(variables, SOURCE, max_length=9, method="begin")
    with pytest.raises(ValueError, match="text of 9 tokens exceeds the 8 learned positions"):
        model.apply(variables, SOURCE, jnp.zeros((B, 9), int))
    model = EncoderDecoder(dataclasses.replace(WRITERS["sinusoidal"], max_length=8))
    with pytest.raises(ValueError, match="max_length=9 exceeds the 8 positions"):
        jax.eval_shape(
            functools.partial(model.init, max_length=9, method="begin"), jax.random.key(0), SOURCE
        )


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
