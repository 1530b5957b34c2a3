"""The decoder: no token sees its future, and a cache changes nothing but the cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.layers.stack import stack_parameters
from jaxformer.models import transformer
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention

V, T = 7, 6
CONFIG = TransformerConfig(
    V, 12, 2, num_heads=4, num_kv_heads=2, head_dim=4, hidden=11, qk_norm=True, tie_embeddings=False
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, T)))


def scanned(variables):
    """The same parameters for a decoder that scans over its blocks."""
    parameters = variables["params"]
    return {"params": parameters | {"blocks": stack_parameters(parameters["blocks"])}}


@pytest.fixture(scope="module")
def variables(draw):
    return draw(Decoder(CONFIG), TOKENS)


@pytest.fixture(scope="module")
def apply(variables):
    return jax.jit(lambda tokens: Decoder(CONFIG).apply(variables, tokens))


def test_no_token_sees_its_future(variables):
    parameters = variables["params"]

    def logits_of(rows):
        # Token t is looked up in row t of the table, so the rows are what the sequence holds.
        table = parameters["embed"]["table"].at[:T].set(rows)
        moved = {"params": parameters | {"embed": {"table": table}}}
        return Decoder(CONFIG).apply(moved, jnp.arange(T)[None])[0]

    testing.assert_causal(logits_of, parameters["embed"]["table"][:T])


@pytest.mark.parametrize("scan", [False, True])
def test_cached_logits_are_the_uncached_ones(variables, apply, scan):
    model = Decoder(dataclasses.replace(CONFIG, scan=scan))
    variables = scanned(variables) if scan else variables
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache))
    cache, found = model.empty_cache(3, T), []
    for part in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:5], TOKENS[:, 5:]):
        new, cache = step(part, cache)
        found.append(new)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), apply(TOKENS), atol=1e-5)
    more, _ = step(TOKENS[:, :1], cache)
    assert np.isnan(more).all()  # the cache is full


def test_the_last_logits_are_those_of_each_rows_last_real_token(variables, apply):
    whole, counts = apply(TOKENS), jnp.array([2, 6, 1])
    model = Decoder(CONFIG)
    run = jax.jit(functools.partial(model.apply, last=True))
    np.testing.assert_allclose(run(variables, TOKENS), whole[:, -1:], atol=1e-5)
    found = run(variables, TOKENS, counts=counts)
    np.testing.assert_allclose(found[:, 0], whole[jnp.arange(3), counts - 1], atol=1e-5)
    for given, at in ((None, [5, 5, 5]), (counts, counts - 1)):
        logits, cache = run(variables, TOKENS, model.empty_cache(3, T), given)
        np.testing.assert_allclose(logits[:, 0], whole[jnp.arange(3), jnp.array(at)], atol=1e-5)
        assert cache.length.tolist() == [at + 1 for at in at]


def test_scanned_logits_are_the_unrolled_ones(variables, apply):
    model = Decoder(dataclasses.replace(CONFIG, scan=True, remat=True))
    found = jax.jit(model.apply)(scanned(variables), TOKENS)
    np.testing.assert_allclose(found, apply(TOKENS), atol=1e-5)


def test_packed_texts_do_not_see_each_other(variables):
    apply = jax.jit(lambda tokens, mask: Decoder(CONFIG).apply(variables, tokens, mask=mask))
    segments = attention.segments(jnp.array([[0, 0, 1, 1, 1, 1]] * 3))
    moved = TOKENS.at[:, 1].set((TOKENS[:, 1] + 1) % V)
    changed = (apply(moved, segments) != apply(TOKENS, segments)).any((0, 2))
    assert changed.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    "choice",
    [
        {"windows": (3, None)},
        {"windows": (2, 2), "scan": True},
        {"windows": (9, 9)},
        {"latent": transformer.LatentConfig(4, None, 3, 5)},
    ],
    ids=["mixed", "all roll", "larger than the cache", "latent"],
)
def test_a_mask_hides_the_same_with_a_cache(draw, choice, monkeypatch):
    monkeypatch.setattr(transformer, "_SLACK", 1)  # no room but for the window
    model = Decoder(dataclasses.replace(CONFIG, **choice))
    variables = draw(model, TOKENS)
    shown = jnp.array([[1] * 6, [0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1]]) == 1
    mask = attention.explicit(shown[:, None, None])
    whole = jax.jit(model.apply)(variables, TOKENS, mask=mask)
    free = jax.jit(model.apply)(variables, TOKENS)
    assert (np.abs(whole - free).max((1, 2)) > 1e-3).tolist() == [False, True, True]
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache, mask=mask))
    cache, found = model.empty_cache(3, T), []
    for part in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:]):
        new, cache = step(part, cache)
        found.append(new)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-5)


def test_a_mask_of_another_size_than_the_caches_is_refused(variables):
    model = Decoder(dataclasses.replace(CONFIG, windows=(2, 2)))
    for mask, message in (
        (attention.explicit(jnp.ones((2, 9), bool)), "T=2.* T=3"),
        (attention.explicit(jnp.ones((3, 8), bool)), "S=8.* S=9"),
        (attention.segments(jnp.zeros((3, 3), int)), "S=3.* S=9"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, TOKENS[:, :3], model.empty_cache(3, 9), mask=mask)


@pytest.mark.parametrize(("scan", "room"), [(False, 40), (True, 40), (False, 8), (False, 3)])
def test_a_window_can_forget_as_many_tokens_as_its_cache_says(draw, scan, room):
    config = dataclasses.replace(CONFIG, windows=(3, 3), scan=scan)
    model, size = Decoder(config), 40
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, size)))
    variables = draw(model, tokens)
    whole = jax.jit(model.apply)(variables, tokens)
    cache = model.empty_cache(3, room)  # a text goes on past the room where all layers roll
    assert (cache.max_length, cache.max_rewind) == (room, 15)
    step = jax.jit(model.apply)
    _, cache = step(variables, tokens[:, :30], cache)
    lengths = jnp.array([30, 21, 15])
    logits, cache = step(variables, tokens[jnp.arange(3), lengths][:, None], cache.rewind(lengths))
    np.testing.assert_allclose(logits[:, 0], whole[jnp.arange(3), lengths], atol=1e-5)
    assert (cache.max_length, cache.max_rewind) == (room, 15)


@pytest.mark.parametrize(
    ("windows", "most"), [((), None), ((9, 9), None), ((9, None), None), ((8, 9), 15)], ids=str
)
def test_all_can_be_forgotten_where_no_layer_rolls(windows, most):
    model = Decoder(dataclasses.replace(CONFIG, windows=windows))
    assert model.empty_cache(3, 8).max_rewind == most


@pytest.mark.parametrize(("positions", "kind"), [("rotary", ""), ("learned", "learned ")])
def test_a_cache_for_more_than_the_longest_text_is_refused(positions, kind):
    model = Decoder(dataclasses.replace(CONFIG, positions=positions, max_length=8))
    assert model.empty_cache(1, 8).max_length == 8
    with pytest.raises(ValueError, match=f"max_length=9 exceeds the 8 {kind}positions"):
        model.empty_cache(1, 9)


def test_tied_logits_are_products_with_the_embeddings(draw):
    model = Decoder(dataclasses.replace(CONFIG, tie_embeddings=True, num_layers=1))
    variables = draw(model, TOKENS)
    assert "head" not in variables["params"]
    run = jax.jit(lambda v: model.apply(v, TOKENS, capture_intermediates=True))
    found, states = run(variables)
    (x,) = states["intermediates"]["norm"]["__call__"]
    table = np.asarray(variables["params"]["embed"]["table"])
    np.testing.assert_allclose(found, np.asarray(x) @ table.T, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_narrow_parameters_give_a_narrow_stream(scan):
    model = Decoder(dataclasses.replace(CONFIG, scan=scan, layer_scale=0.1))

    def step(key, cache):
        variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.init(key, TOKENS))
        return model.apply(variables, TOKENS, cache)

    cache = model.empty_cache(3, T, jnp.bfloat16)
    logits, new = jax.eval_shape(step, jax.random.key(0), cache)
    assert logits.dtype == jnp.bfloat16
    assert [a.dtype for a in jax.tree.leaves(new)] == [a.dtype for a in jax.tree.leaves(cache)]


def test_a_token_outside_the_vocabulary_gives_nan(apply):
    for token in (-1, V):
        assert np.isnan(apply(TOKENS.at[0, 2].set(token))[0, 2:]).all()


def test_a_decoder_can_be_used_from_nnx(variables, apply):
    try:
        from flax import nnx
    except (ImportError, AttributeError):
        pytest.skip("this Flax has no NNX for this JAX")

    @nnx.eval_shape
    def abstract():
        model = nnx.bridge.ToNNX(Decoder(CONFIG))
        return nnx.bridge.lazy_init(model, TOKENS, rngs=jax.random.key(0))

    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, variables["params"])
    model = nnx.merge(graph, state)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, TOKENS), apply(TOKENS), atol=1e-6)
