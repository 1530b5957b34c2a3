"""The encoder: looks both ways, and not at padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention

V, B, S = 7, 3, 5
CONFIG = TransformerConfig(V, 12, 2, num_heads=4, num_kv_heads=2, head_dim=4, hidden=11)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, S)))
LENGTHS = np.array([5, 3, 1])
REAL = np.arange(S)[None] < LENGTHS[:, None]


@pytest.fixture(scope="module")
def variables(draw):
    return draw(Encoder(CONFIG), TOKENS)


@pytest.fixture(scope="module")
def encode(variables):
    return jax.jit(lambda tokens, mask: Encoder(CONFIG).apply(variables, tokens, mask))


def test_what_is_padded_changes_nothing(encode):
    mask = attention.key_lengths(jnp.asarray(LENGTHS))
    y = np.asarray(encode(TOKENS, mask))
    other = np.asarray(encode(jnp.where(REAL, TOKENS, 0), mask))
    assert (y[REAL] == other[REAL]).all()
    np.testing.assert_allclose(y[1:2, :3], encode(TOKENS[1:2, :3], None), atol=1e-5)


def test_a_row_that_is_all_padding_stays_finite(encode):
    y = encode(TOKENS, attention.key_lengths(jnp.array([5, 0, 1])))
    assert np.isfinite(y).all()


def test_every_token_sees_every_other(encode):
    y = encode(TOKENS, None)
    for place in (0, S - 1):
        moved = TOKENS.at[:, place].set((TOKENS[:, place] + 1) % V)
        assert (np.abs(encode(moved, None) - y).max(-1) > 1e-4).all()


def test_moving_the_whole_text_in_a_packed_row_changes_nothing(encode):
    def shift(tokens):
        return jnp.roll(tokens, 2, axis=1)

    ids = jnp.array([[0, 0, 0, 1, 1]] * B)
    testing.assert_equivariant(
        lambda x: encode(x[0], attention.segments(x[1])),
        (TOKENS, ids),
        lambda x: jax.tree.map(shift, x),
        lambda y: jnp.roll(y, 2, axis=1),
        atol=1e-4,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_products_with_the_head_or_the_embeddings(draw, tied):
    model = Encoder(dataclasses.replace(CONFIG, tie_embeddings=tied))
    variables = draw(model, TOKENS, method="logits")
    parameters = variables["params"]

    @jax.jit
    def both(variables):
        x = model.apply(variables, TOKENS)
        return x, model.apply(variables, TOKENS, method="logits")

    x, logits = both(variables)
    table = parameters["embed"]["table"].T if tied else parameters["head"]["kernel"]
    np.testing.assert_allclose(logits, np.asarray(x) @ table, atol=1e-5)
    assert ("head" in parameters) != tied


FULL = dataclasses.replace(
    CONFIG, positions="learned", max_length=8, position_offset=2, pad_token=1, token_types=2
)


def test_positions_are_counted_over_what_is_no_padding(draw):
    variables = draw(Encoder(FULL), TOKENS)
    run = jax.jit(lambda *args, **kwargs: Encoder(FULL).apply(variables, *args, **kwargs))
    text = jnp.array([[4, 2, 6]])
    left = run(jnp.array([[1, 1, 4, 2, 6]]), attention.explicit(jnp.arange(5)[None] > 1))
    right = run(jnp.array([[4, 2, 6, 1, 1]]), attention.key_lengths(jnp.array([3])))
    np.testing.assert_allclose(left[:, 2:], run(text), atol=1e-5)
    np.testing.assert_allclose(right[:, :3], run(text), atol=1e-5)
    given = run(text, positions=jnp.array([2, 3, 4]))
    assert np.abs(given - run(text)).max() > 1e-3


def test_kinds_of_tokens_matter_and_are_refused_where_there_are_none(draw):
    variables = draw(Encoder(FULL), TOKENS)
    first, second = (
        Encoder(FULL).apply(variables, TOKENS, token_types=jnp.full((B, S), kind))
        for kind in (0, 1)
    )
    np.testing.assert_array_equal(first, Encoder(FULL).apply(variables, TOKENS))
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(ValueError, match="token_types are given"):
        Encoder(CONFIG).init(jax.random.key(0), TOKENS, token_types=TOKENS)


def test_a_window_looks_back_and_ahead(draw):
    config = dataclasses.replace(CONFIG, num_layers=1, windows=(2,), ahead=2)
    variables = draw(Encoder(config), TOKENS)
    one = Encoder(config).apply(variables, TOKENS)
    moved = np.abs(one - Encoder(config).apply(variables, TOKENS.at[:, 2].add(1))).max((0, 2))
    assert (moved > 1e-4).tolist() == [True, True, True, True, False]


def test_what_an_encoder_cannot_have_is_named():
    alibi = dataclasses.replace(CONFIG, positions="alibi")
    with pytest.raises(NotImplementedError, match="ALiBi"):
        Encoder(alibi).init(jax.random.key(0), TOKENS)
    short = dataclasses.replace(CONFIG, positions="learned", max_length=4)
    with pytest.raises(ValueError, match="text of 5 tokens exceeds the 4 learned positions"):
        Encoder(short).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="pad_token=1 needs a row"):
        dataclasses.replace(CONFIG, positions="learned", max_length=8, pad_token=1)
    with pytest.raises(ValueError, match="first_norm=False"):
        dataclasses.replace(CONFIG, first_norm=False, order="post")
