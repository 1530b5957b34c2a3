"""Masks draw what they say, combine, and pass through JAX with their structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import attention
from jaxformer.ops.attention import masks

ROWS, QUERIES, KEYS = 3, 7, 11


def picture(mask, queries=QUERIES, keys=KEYS):
    """Draws a mask that is the same for every row and head, as lines of x and dots."""
    (drawn,) = np.asarray(mask.dense(queries, keys)).reshape(-1, queries, keys)
    return ["".join("x" if seen else "." for seen in row) for row in drawn]


def test_causal_with_an_offset_is_a_shifted_triangle():
    assert picture(attention.causal(), 3, 5) == ["x....", "xx...", "xxx.."]
    assert picture(attention.causal(2), 3, 5) == ["xxx..", "xxxx.", "xxxxx"]
    assert picture(attention.causal(-1), 3, 5) == [".....", "x....", "xx..."]


def test_window_is_a_band():
    assert picture(attention.window(1), 4, 5) == ["x....", "xx...", ".xx..", "..xx."]
    assert picture(attention.window(1, 2), 4, 5) == ["xxx..", "xxxx.", ".xxxx", "..xxx"]
    assert picture(attention.window(None, -1), 3, 3) == ["...", "x..", "xx."]
    assert picture(attention.window(0, None, offset=1), 3, 4) == [".xxx", "..xx", "...x"]


def test_the_block_patterns_are_those_of_sparse_transformers():
    causal = attention.causal()
    assert picture(causal & attention.local_global(3), 7, 7) == [
        "x......",
        "xx.....",
        "xxx....",
        "..xx...",
        "..xxx..",
        "..xxxx.",
        "..x..xx",
    ]
    assert picture(causal & attention.strided(3), 7, 7) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        ".xxxx..",
        "..xxxx.",
        "x..xxxx",
    ]
    assert picture(attention.local_global(3, 2, offset=2), 2, 6) == ["xxx.xx", ".xxxxx"]


def test_a_sparse_pattern_of_root_n_costs_n_root_n():
    def seen(length):
        side = int(length**0.5)
        mask = attention.causal() & attention.local_global(side)
        return int(mask.dense(length, length).sum())

    assert abs(np.log(seen(1024) / seen(64)) / np.log(1024 / 64) - 1.5) < 0.05


def test_prefix_and_key_lengths_show_the_first_keys_of_each_row():
    lengths = jnp.array([0, 2, 5])
    expected = np.arange(5)[None, None, None] < np.array([0, 2, 5])[:, None, None, None]
    assert (np.asarray(attention.key_lengths(lengths).dense(4, 5)) == expected).all()
    assert (np.asarray(attention.prefix(lengths).dense(4, 5)) == expected).all()


def test_a_prefix_language_model_sees_the_prefix_and_the_past():
    mask = attention.causal() | attention.prefix(jnp.array([2]))
    assert picture(mask, 4, 4) == ["xx..", "xx..", "xxx.", "xxxx"]


def test_segments_see_their_own_kind():
    mask = attention.segments(jnp.array([[0, 0, 1]]), jnp.array([[1, 0, 0, 9]]))
    assert picture(mask, 3, 4) == [".xx.", ".xx.", "x..."]
    assert picture(attention.segments(jnp.array([[4, 4, 2]])), 3, 3) == ["xx.", "xx.", "..x"]


def test_and_narrows_and_or_widens():
    a, b = attention.window(2, 2), attention.strided(3)
    for mask, operation in ((a & b, np.logical_and), (a | b, np.logical_or)):
        expected = operation(a.dense(QUERIES, KEYS), b.dense(QUERIES, KEYS))
        assert (np.asarray(mask.dense(QUERIES, KEYS)) == expected).all()


def test_axes_that_a_mask_does_not_depend_on_have_size_one():
    assert attention.causal().dense(QUERIES, KEYS).shape == (1, 1, QUERIES, KEYS)
    lengths = attention.key_lengths(jnp.zeros(ROWS, int))
    assert lengths.dense(QUERIES, KEYS).shape == (ROWS, 1, 1, KEYS)
    assert attention.explicit(jnp.ones((5, 1, KEYS), bool)).dense(QUERIES, KEYS).shape[1] == 5


@pytest.mark.parametrize("make", [attention.causal, lambda o: attention.local_global(3, 1, o)])
def test_traced_offsets_draw_what_static_ones_do(make):
    draw = jax.jit(lambda offset: make(offset).dense(QUERIES, KEYS))
    for offset in (0, 3):
        assert (draw(jnp.array(offset)) == make(offset).dense(QUERIES, KEYS)).all()
    by_row = make(jnp.array([0, 3])).dense(QUERIES, KEYS)
    for row, offset in enumerate((0, 3)):
        assert (by_row[row] == make(offset).dense(QUERIES, KEYS)[0]).all()


@pytest.mark.parametrize(
    "mask",
    [
        attention.causal(jnp.array([4, 0, 2])),
        attention.coarse(attention.causal(), 2, 3) | attention.strided(4, 1),
        attention.key_lengths(jnp.array([3, 11, 0])),
        attention.segments(jnp.arange(21).reshape(3, 7) % 3, jnp.arange(33).reshape(3, 11) % 3),
        attention.explicit(jnp.arange(11) % 3 > 0) & attention.local_global(3),
        attention.explicit(jnp.arange(2 * 7 * 11).reshape(1, 2, 7, 11) % 5 > 0),
        attention.explicit(jnp.arange(7)[:, None] > 2),
    ],
)
def test_keys_in_any_order_are_drawn_as_in_order(mask):
    random = np.random.default_rng(0)
    every = np.broadcast_to(mask.dense(QUERIES, KEYS), (ROWS, 2, QUERIES, KEYS))
    for rows in (ROWS, 1):
        places = random.integers(0, KEYS, (rows, 5))
        found = np.broadcast_to(mask.at(QUERIES, jnp.asarray(places)), (ROWS, 2, QUERIES, 5))
        index = np.broadcast_to(places, (ROWS, 5))[:, None, None]
        np.testing.assert_array_equal(found, np.take_along_axis(every, index, axis=-1))


def test_keys_past_the_end_of_a_mask_are_hidden():
    for mask in (
        attention.explicit(jnp.ones((2, KEYS), bool)),
        attention.segments(jnp.zeros((1, 2), int), jnp.zeros((1, KEYS), int)),
    ):
        found = mask.at(2, jnp.array([[KEYS - 1, KEYS, 0, KEYS + 7]]))
        assert found[0, 0, 1].tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"T=2.* T=7"):
        attention.explicit(jnp.ones((2, KEYS), bool)).at(QUERIES, jnp.zeros((1, 3), int))


def test_structure_survives_jit_and_static_masks_compare_equal():
    mask = attention.causal(2) & attention.key_lengths(jnp.array([1, 2]))

    @jax.jit
    def through(mask):
        assert mask.left == masks.Band(None, 0, 2)  # static: known while tracing
        return mask

    assert jax.tree.structure(through(mask)) == jax.tree.structure(mask)
    assert len(jax.tree.leaves(mask)) == 1
    assert attention.causal() == attention.causal() != attention.causal(1)
    assert hash(attention.window(3)) == hash(attention.window(3))


def test_masks_can_be_mapped_over():
    lengths = jnp.array([[1, 2], [3, 4], [5, 6]])
    many = jax.vmap(attention.key_lengths)(lengths)
    drawn = jax.vmap(lambda mask: mask.dense(2, 7))(many)
    assert (drawn[:, :, 0, 0].sum(-1) == lengths).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention.window(2, -3), "left=2 and right=-3"),
        (lambda: attention.window(None, None), "one side"),
        (lambda: attention.local_global(3, 4), "summary=4, block=3"),
        (lambda: attention.strided(0), "stride=0"),
        (lambda: attention.explicit(jnp.ones((2, 2))), "float32"),
        (lambda: attention.explicit(jnp.ones((2,) * 5, bool)), "shape="),
    ],
)
def test_senseless_masks_are_refused_when_made(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention.explicit(jnp.ones((5, 1), bool)), "T=5.* T=7"),
        (lambda: attention.explicit(jnp.ones((1, 5), bool)), "S=5.* S=11"),
        (lambda: attention.segments(jnp.ones((2, 5), int)), "T=5.* T=7"),
        (lambda: attention.segments(jnp.ones((2, 7), int)), "S=7.* S=11"),
        (
            lambda: attention.prefix(jnp.ones(2, int)) & attention.prefix(jnp.ones(3, int)),
            "B=2 and B=3",
        ),
    ],
)
def test_masks_of_other_sizes_are_named_in_the_error(make, message):
    with pytest.raises(ValueError, match=message):
        make().dense(QUERIES, KEYS)


def test_segments_of_different_batches_are_refused(untyped):
    with pytest.raises(ValueError, match=r"B=2.*B=3"):
        attention.segments(jnp.ones((2, 5), int), jnp.ones((3, 5), int))


def test_joining_a_mask_with_an_array_is_a_type_error():
    with pytest.raises(TypeError):
        attention.causal() & 3
