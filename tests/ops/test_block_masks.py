"""Blocks have the published sizes, lie anywhere, and never let a context see its targets."""

import numpy as np
import pytest

from jaxformer.ops import block_masks

GRID, P, B = (14, 15), 210, 32


def generator(seed=0):
    return np.random.default_rng(seed)


def as_masks(indices, patches=P):
    """True at each index below `patches`."""
    return (indices[..., None] == np.arange(patches)).any(axis=-2)


def drawn(count, **options):
    random = generator()
    return [block_masks.multi_block(random, B, GRID, 90, **options) for _ in range(count)]


MANY = drawn(60)


def extents(mask, grid):
    """Height and width of a mask that is one full block, and where it begins."""
    rows, columns = np.nonzero(mask.reshape(grid))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height * width == mask.sum()
    return height, width, rows.min(), columns.min()


def test_targets_are_blocks_of_the_published_sizes_one_size_a_batch():
    sizes = []
    for context in MANY:
        assert context.targets.shape == (B, 4, MANY[0].targets.shape[-1])
        masks = as_masks(context.targets)
        found = {extents(mask, GRID)[:2] for mask in masks.reshape(-1, P)}
        assert len(found) == 1
        sizes += found
    heights, widths = np.array(sizes).T
    assert len(set(sizes)) > 3
    # The area is rounded down and both sides to whole numbers, before which the ranges hold.
    assert ((heights - 0.5) * (widths - 0.5) <= 0.2 * P).all()
    assert ((heights + 0.5) * (widths + 0.5) >= int(0.15 * P)).all()
    assert ((heights - 0.5) / (widths + 0.5) <= 1.5).all()
    assert ((heights + 0.5) / (widths - 0.5) >= 0.75).all()
    assert 0.15 <= (heights * widths / P).mean() <= 0.2


def test_no_context_sees_a_target():
    for context in MANY:
        aimed = as_masks(context.targets).any(axis=1)
        seen = as_masks(context.shown)
        assert not (aimed & seen).any()
        assert seen.any(axis=1).all()


def test_a_context_that_is_not_cut_is_its_block_less_the_targets():
    context = block_masks.multi_block(generator(), B, GRID, P, context_scale=(1.0, 1.0))
    rest = ~as_masks(context.targets).any(axis=1).reshape(B, *GRID)
    seen = as_masks(context.shown).reshape(B, *GRID)
    missing = rest & ~seen  # a square of 14 in a grid of 14 × 15 leaves one column at an edge
    left, right = missing[:, :, 0].any(axis=1), missing[:, :, -1].any(axis=1)
    assert not missing[:, :, 1:-1].any()
    assert not (left & right).any()
    assert left.any()
    assert right.any()


def test_contexts_are_as_large_as_documented():
    random, sizes = generator(), []
    for _ in range(100):
        context = block_masks.multi_block(random, 64, (14, 14), 196)
        sizes += (context.shown < 196).sum(axis=1).tolist()
    assert abs(np.median(sizes) - 89) <= 3
    assert abs(np.quantile(sizes, 0.1) - 67) <= 3


@pytest.mark.parametrize("part", ["shown", "targets"])
def test_indices_ascend_in_range_and_fill_up_behind(part):
    for context in MANY:
        indices = getattr(context, part)
        assert indices.dtype == np.int32
        step = np.diff(indices, axis=-1)
        assert ((step > 0) | (indices[..., 1:] == P)).all()
        assert indices.min() >= 0
        assert indices.max() <= P


def test_every_shape_is_the_same_whatever_is_drawn():
    assert len({(context.shown.shape, context.targets.shape) for context in MANY}) == 1
    assert MANY[0].shown.shape == (B, 90)
    for seed in range(300):  # the bound on a target holds where every side is rounded up
        context = block_masks.multi_block(generator(seed), 1, (5, 7), 35, targets=1)
        assert context.targets.shape == (1, 1, 9)


def test_blocks_lie_anywhere_in_the_grid():
    found = np.array([extents(mask, GRID) for mask in as_masks(MANY[0].targets).reshape(-1, P)])
    height, width = found[0, :2]
    assert set(found[:, 2]) == set(range(GRID[0] - height + 1))
    assert set(found[:, 3]) == set(range(GRID[1] - width + 1))


def test_the_same_generator_draws_the_same():
    for one, two in zip(drawn(2), MANY):
        np.testing.assert_array_equal(one.shown, two.shown)
        np.testing.assert_array_equal(one.targets, two.targets)
    assert (MANY[0].shown != MANY[1].shown).any()


def test_contexts_with_too_little_are_drawn_again_or_refused():
    context = block_masks.multi_block(generator(), 512, (7, 7), 49, least=20)
    assert (context.shown < 49).sum(axis=1).min() >= 20
    whole = {"target_scale": (1.0, 1.0), "target_aspect": (1.0, 1.0)}
    with pytest.raises(ValueError, match=r"4 targets of 4×4 leave fewer than least=1 .* of 4×4"):
        block_masks.multi_block(generator(), 2, (4, 4), 16, **whole)


@pytest.mark.parametrize(("blocks", "scale"), [(8, 0.15), (2, 0.7), (1, 0.3)])
def test_tubes_are_unions_of_blocks_and_the_same_in_all_frames(blocks, scale):
    mask = block_masks.tubes(generator(), B, (3, *GRID), blocks=blocks, scale=scale)
    frames = mask.reshape(B, 3, P)
    assert (frames == frames[:, :1]).all()
    share = frames[:, 0].mean(axis=1)
    assert (share <= min(1, blocks * scale * 1.2)).all()
    assert (share >= scale * 0.8).all()
    if blocks == 1:
        assert len({extents(row, GRID)[:2] for row in frames[:, 0]}) == 1
    assert len(np.unique(frames[:, 0], axis=0)) > 1


def test_of_every_video_something_is_left_or_it_is_said():
    mask = block_masks.tubes(generator(), 2000, (2, 7, 7), blocks=2, scale=0.7)
    assert not mask.all(axis=1).any()
    with pytest.raises(ValueError, match="1 blocks of 3×3 leave nothing of 3×3"):
        block_masks.tubes(generator(), 1, (1, 3, 3), blocks=1, scale=1.0, aspect=(1.0, 1.0))


@pytest.mark.parametrize("grid", [(4, 64), (64, 4), (7, 28)])
def test_blocks_of_flat_grids_cover_their_share(grid):
    for seed in range(20):
        drawn = block_masks.multi_block(
            generator(seed), 3, grid, grid[0] * grid[1], targets=1, target_aspect=(1.0, 1.0)
        )
        share = (drawn.targets < grid[0] * grid[1]).sum(axis=-1) / (grid[0] * grid[1])
        assert (share > 0.12).all()
        assert (share < 0.23).all()
        shown = (drawn.shown < grid[0] * grid[1]).sum(axis=-1) / (grid[0] * grid[1])
        assert (shown > 0.85 - 0.03 - 0.23).all()


def test_half_of_the_images_are_hidden_from_at_rates_spread_evenly():
    random, shares = generator(), []
    for _ in range(20):
        mask = block_masks.blockwise(random, B, GRID)
        assert mask.shape == (B, P)
        share = np.sort(mask.mean(axis=1))
        assert (share[: B // 2] == 0).all()
        assert (share[B // 2 :] > 0).all()
        edges = np.linspace(0.1, 0.5, B // 2 + 1)
        assert (share <= np.append(np.zeros(B // 2), edges[1:])).all()
        shares.append(share[B // 2 :])
    shares = np.array(shares)
    middles = (edges[:-1] + edges[1:]) / 2
    assert np.abs(shares.mean(axis=0) - middles).max() < 0.02
    first = [block_masks.blockwise(generator(i), B, GRID)[0].any() for i in range(200)]
    assert 70 < sum(first) < 130  # which images, is drawn as well


def test_what_is_hidden_blockwise_hangs_together():
    mask = block_masks.blockwise(generator(), B, GRID, share=1.0, rates=(0.3, 0.3))
    grid = mask.reshape(B, *GRID)
    alike = (grid[:, 1:] == grid[:, :-1]).mean()
    scattered = generator().permuted(mask, axis=1).reshape(B, *GRID)
    assert alike > 0.8 > 0.65 > (scattered[:, 1:] == scattered[:, :-1]).mean()
    assert (mask.sum(axis=1) <= 63).all()
    assert mask.sum(axis=1).mean() > 60


@pytest.mark.parametrize(
    ("aspect", "expected"),
    [(1.0, {(6, 6)}), (0.55, {(6, 6)}), (0.3, {(4, 9), (6, 6), (9, 4)})],
)
def test_a_block_has_at_least_the_smallest_area_and_the_aspect(aspect, expected):
    options = {"share": 1.0, "rates": (0.172, 0.172), "smallest": 36}  # of 36 patches to be hidden
    found = set()
    for mask in block_masks.blockwise(generator(), 300, GRID, aspect=aspect, **options):
        rows, columns = np.nonzero(mask.reshape(GRID))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if height * width == mask.sum() == 36:  # one block, with none beside it
            found.add((height, width))
    assert found == expected


def test_indices_name_the_places_of_a_mask():
    mask = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
    expected = [[1, 2, 4, 5], [5, 5, 5, 5], [0, 1, 2, 5]]
    assert block_masks.indices(mask, 4).tolist() == expected
    assert block_masks.indices(mask[0], 7).tolist() == [1, 2, 4, 5, 5, 5, 5]
    np.testing.assert_array_equal(as_masks(block_masks.indices(mask, 3), 5), mask)
    with pytest.raises(ValueError, match="3 patches of a mask do not fit into size=2"):
        block_masks.indices(mask, 2)


def test_of_too_many_places_each_is_named_as_often():
    mask = np.tile(np.array([1, 1, 0, 1, 1], bool), (4000, 1))
    found = block_masks.indices(mask, 2, generator())
    named = as_masks(found, 5).mean(axis=0)
    np.testing.assert_allclose(named, [0.5, 0.5, 0, 0.5, 0.5], atol=0.04)
    assert (np.diff(found, axis=1) > 0).all()
