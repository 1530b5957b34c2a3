"""Lists of blocks say of each what the drawn mask says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops import attention
from jaxformer.ops.attention import blocks, masks

CASES = {case.name: case for case in testing.attention_cases() if case.mask}
SIZES = [(4, 3), (5, 5), (2, 16), (1, 1), (16, 2)]


def drawn(case, query_block, key_block):
    """The three kinds, from the drawn mask: whether any, and whether every pair may look."""
    t, s = case.query_length, case.key_length
    dense = np.asarray(case.inputs()["mask"].dense(t, s))
    dense = np.broadcast_to(dense, (*dense.shape[:2], t, s))
    rows = [dense[:, :, i : i + query_block] for i in range(0, t, query_block)]
    tiles = [[r[..., j : j + key_block] for j in range(0, s, key_block)] for r in rows]
    some = np.array([[x.any((2, 3)) for x in row] for row in tiles])
    every = np.array([[x.all((2, 3)) & (x.shape[3] == key_block) for x in row] for row in tiles])
    return np.moveaxis(some, (0, 1), (2, 3)), np.moveaxis(every, (0, 1), (2, 3))


@pytest.mark.parametrize("name", CASES)
def test_no_block_is_skipped_or_called_whole_wrongly(name):
    case = CASES[name]
    for size in SIZES:
        some, every = drawn(case, *size)
        shape = (case.query_length, case.key_length, *size)
        kind = np.asarray(blocks.kinds(case.inputs()["mask"], *shape))
        static = blocks.kinds(case.inputs()["mask"], *shape, static=True)
        assert (some <= (kind != blocks.SKIP)).all()
        assert ((kind == blocks.WHOLE) <= every).all()
        assert ((kind != blocks.SKIP) <= (static != blocks.SKIP)).all()
        assert isinstance(static, np.ndarray)


@pytest.mark.parametrize(
    "mask",
    [
        attention.causal(),
        attention.causal(3),
        attention.window(6, 2),
        attention.window(None, -1),
        attention.segments(jnp.asarray(np.arange(3)[:, None] + np.arange(13) // 4)),
        attention.key_lengths(jnp.array([0, 7, 13])),
        attention.coarse(attention.causal(), 4, 2),
    ],
)
def test_a_mask_without_joins_is_classified_exactly(mask):
    case = testing.AttentionCase("", lambda c: mask)
    for size in SIZES:
        some, every = drawn(case, *size)
        kind = np.asarray(blocks.kinds(mask, 13, 13, *size))
        np.testing.assert_array_equal(kind != blocks.SKIP, np.broadcast_to(some, kind.shape))
        np.testing.assert_array_equal(kind == blocks.WHOLE, np.broadcast_to(every, kind.shape))


def test_the_blocks_of_a_causal_mask_can_be_seen():
    np.testing.assert_array_equal(
        blocks.kinds(attention.causal(), 8, 8, 2, 4)[0, 0], [[2, 0], [2, 0], [1, 2], [1, 2]]
    )


def test_pairs_pass_by_each_row_once_and_skip_what_is_static():
    found = blocks.pairs(attention.causal(-4), 8, 8, 2, 2)
    np.testing.assert_array_equal(found.query, [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(found.key, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(found.first, [True, True, True, True, False])
    np.testing.assert_array_equal(found.last, [True, True, True, False, True])
    np.testing.assert_array_equal(found.kind[0, 0], [0, 0, 2, 1, 2])


def test_pairs_by_key_are_the_same_pairs():
    mask = attention.window(3, 1)
    one = blocks.pairs(mask, 13, 17, 3, 4)
    other = blocks.pairs(mask, 13, 17, 3, 4, by="key")
    kinds = [dict(zip(zip(x.query, x.key), x.kind[0, 0])) for x in (one, other)]
    computed = [{pair for pair, kind in k.items() if kind} for k in kinds]
    assert computed[0] == computed[1]
    assert (np.diff(other.key) >= 0).all()
    assert sorted(set(other.key)) == list(range(5))  # keys that nobody sees are passed by too


def test_arrays_of_a_mask_decide_the_kind_while_running():
    @jax.jit
    def kind(lengths):
        found = blocks.pairs(attention.causal() & attention.key_lengths(lengths), 8, 8, 4, 4)
        assert isinstance(found.query, np.ndarray)
        return found.kind

    np.testing.assert_array_equal(kind(jnp.array([8, 3]))[:, 0], [[2, 1, 2], [2, 2, 0]])


def test_axes_of_leaves_are_in_the_order_of_the_tree():
    mask = attention.causal(jnp.array(1)) & attention.segments(jnp.zeros((1, 3), int))
    assert masks.leaf_axes(mask) == ["B", "BT", "BS"]
    assert len(jax.tree.leaves(mask)) == 3


def test_only_blocks_that_the_mask_leaves_are_walked_and_whole_ones_come_first():
    kind = blocks.kinds(attention.window(40), 200, 200, 32, 16)
    order, count = blocks.listed(kind)
    assert count.sum() == len(blocks.pairs(attention.window(40), 200, 200, 32, 16).query)
    assert order.shape[-1] == count.sum(-1).max() < kind.shape[-1]
    for row, (whole, masked) in enumerate(count[0, 0]):
        found = kind[0, 0, row, order[0, 0, row, : whole + masked]]
        np.testing.assert_array_equal(found, [blocks.WHOLE] * whole + [blocks.MASKED] * masked)
    traced = jax.jit(blocks.listed)(kind)
    np.testing.assert_array_equal(traced[0][..., : order.shape[-1]], order)
    np.testing.assert_array_equal(traced[1], count)
