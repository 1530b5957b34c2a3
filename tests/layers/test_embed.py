"""Embeddings: lookups by formula, and what happens to tokens and places that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.embed import (
    Embed,
    GridPositions,
    LearnedPositions,
    NeighbourEmbed,
    RelativeBias,
)
from jaxformer.ops import positions

V, D, B, T = 7, 5, 2, 12
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
COLUMNS = 3
OFFSETS = ((-2, 0), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1))


def test_tokens_are_looked_up_and_logits_use_the_same_table(draw):
    embed = Embed(V, D)
    variables = draw(embed, TOKENS)
    table = np.asarray(variables["params"]["table"])
    x = embed.apply(variables, TOKENS)
    assert (x == table[TOKENS]).all()
    logits = embed.apply(variables, x, method="logits")
    np.testing.assert_allclose(logits, table[TOKENS] @ table.T, atol=1e-5)
    assert embed.apply(variables, x.astype(jnp.bfloat16), method="logits").dtype == jnp.bfloat16


def test_a_token_that_is_none_becomes_nan(draw):
    embed = Embed(V, D)
    tokens = jnp.array([0, V - 1, V, -1, -V])
    x = embed.apply(draw(embed, tokens), tokens)
    assert np.isnan(x).all(-1).tolist() == [False, False, True, True, True]


def test_learned_positions_add_the_rows_from_the_offset_on(draw):
    layer, x = LearnedPositions(T), jnp.ones((B, 5, D), jnp.bfloat16)
    variables = draw(layer, x)
    table = variables["params"]["table"]
    assert table.shape == (T, D)
    expected = x + table[3:8].astype(x.dtype)[None]
    assert (layer.apply(variables, x, 3) == expected).all()
    assert (layer.apply(variables, x, jnp.array(3)) == expected).all()


def test_learned_positions_past_the_end_raise_or_are_nan(draw):
    layer, x = LearnedPositions(T), jnp.ones((B, 5, D))
    variables = draw(layer, x)
    with pytest.raises(ValueError, match=r"8..12 .* 12 rows"):
        layer.apply(variables, x, 8)
    y = layer.apply(variables, x, jnp.array(8))
    assert np.isnan(y).all((0, 2)).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_relative_bias_depends_on_distance_alone_wherever_a_row_stands(bidirectional):
    layer = RelativeBias(3, num_buckets=8, max_distance=20, bidirectional=bidirectional)
    table = np.random.default_rng(2).standard_normal((8, 3))
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    assert layer.init(jax.random.key(0), 2, 2)["params"]["table"].shape == (8, 3)
    whole = layer.apply(variables, 11, 11)
    assert whole.shape == (1, 3, 11, 11)
    for n in range(3):
        for distance in range(-10, 11):
            assert len(np.unique(np.diag(whole[0, n], distance))) == 1
    assert (len(np.unique(whole[0, 0, 0])) == 1) is not bidirectional
    offsets = jnp.array([0, 6, 2])
    rows = layer.apply(variables, 5, 11, offsets)
    for row, offset in zip(rows, offsets.tolist(), strict=True):
        np.testing.assert_array_equal(row, whole[0, :, offset : offset + 5])
    np.testing.assert_array_equal(layer.apply(variables, 5, 11, offsets[1]), rows[1:2])


def neighbours(table, tokens):
    """One cell and one neighbour at a time."""
    out = np.zeros((*tokens.shape, table.shape[-1]))
    for b, t in np.ndindex(tokens.shape):
        for i, (row, column) in enumerate(OFFSETS):
            r, c = t // COLUMNS + row, t % COLUMNS + column
            inside = r >= 0 and 0 <= c < COLUMNS
            out[b, t] += table[i, tokens[b, 1 + r * COLUMNS + c] if inside else V]
    return out


def test_neighbours_are_those_of_the_grid(draw):
    layer = NeighbourEmbed(V, D, COLUMNS, OFFSETS)
    tokens = TOKENS.at[:, 0].set(V + 3)  # the start token is nobody's neighbour
    variables = draw(layer, tokens)
    expected = neighbours(np.float64(variables["params"]["table"]), np.asarray(tokens))
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, tokens), expected, atol=1e-5)


def test_positions_can_be_embedded_one_by_one_before_the_rest_is_known(draw):
    layer = NeighbourEmbed(V, D, COLUMNS, OFFSETS)
    variables = draw(layer, TOKENS)
    whole = layer.apply(variables, TOKENS)
    one = jax.jit(lambda tokens, first: layer.apply(variables, tokens, first, 1))
    for t in range(T):
        known = jnp.where(jnp.arange(T) <= t, TOKENS, -1)
        np.testing.assert_allclose(one(known, jnp.array(t)), whole[:, t : t + 1], atol=1e-6)


@pytest.mark.parametrize("token", [V, -1])
def test_a_neighbour_that_is_no_token_gives_nan(draw, token):
    layer = NeighbourEmbed(V, D, COLUMNS, ((0, -1),))
    tokens = TOKENS.at[1, 5].set(token)  # cell 4, left of cell 5
    wrong = np.isnan(layer.apply(draw(layer, tokens), tokens)).all(-1)
    assert np.argwhere(wrong).tolist() == [[1, 5]]


def test_without_neighbours_there_is_nothing_to_add(draw):
    layer = NeighbourEmbed(V, D, COLUMNS, ())
    y = layer.apply(draw(layer, TOKENS), TOKENS)
    assert y.shape == (B, T, D)
    assert not y.any()


@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, -1)])
def test_neighbours_that_are_not_yet_known_are_refused(offset):
    with pytest.raises(ValueError, match=rf"\({offset[0]}, {offset[1]}\)"):
        NeighbourEmbed(V, D, COLUMNS, (offset,)).init(jax.random.key(0), TOKENS)


def test_positions_of_a_grid_are_learned_and_resized_but_not_those_before(draw):
    layer = GridPositions((2, 3), 4, before=2, antialias=True)
    variables = draw(layer, grid=(2, 3))
    table = variables["params"]["table"]
    assert table.shape == (2 + 6, 4)
    assert (layer.apply(variables, (2, 3)) == table).all()
    wide = layer.apply(variables, (2, 5))
    assert (wide[:2] == table[:2]).all()
    expected = positions.resize_grid(table[2:], (2, 3), (2, 5), antialias=True)
    np.testing.assert_array_equal(wide[2:], expected)


def test_positions_of_a_grid_may_be_waves_without_parameters():
    layer = GridPositions((2, 3), 4, learned=False, before=1)
    table = layer.apply({}, (3, 2))
    assert table.shape == (1 + 6, 4)
    assert (table[0] == 0).all()
    places = jnp.asarray([[row, column] for row in range(3) for column in range(2)], jnp.float32)
    np.testing.assert_array_equal(table[1:], positions.sinusoidal_grid(places, 4))
