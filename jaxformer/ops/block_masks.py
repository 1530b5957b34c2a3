"""Blocks of patches to hide, drawn on the host as batches are: NumPy functions of a generator.

A grid is `(rows, columns)` of patches, numbered by rows as `patches.patchify` numbers them. How
many patches blocks cover varies, but shapes do not, so that no step is compiled anew: masks are of
all P patches, and indices fill up with P, which `patch_masks` takes for no patch.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxformer.typing import Bool, Int

Range = tuple[float, float]
Grid = tuple[int, int]
_TRIES = 10  # for a block of a blockwise mask, as its authors try


class Context(NamedTuple):
    """What a JEPA shows its encoder, and the blocks that it predicts; filled up with P.

    Attributes:
        shown: Indices of the patches to encode, ascending, none of them in a target.
        targets: Indices of the patches of each of M blocks, ascending.
    """

    shown: Int[np.ndarray, "B S"]
    targets: Int[np.ndarray, "B M T"]


def multi_block(
    random: np.random.Generator,
    images: int,
    grid: Grid,
    shown: int,
    *,
    targets: int = 4,
    target_scale: Range = (0.15, 0.2),
    target_aspect: Range = (0.75, 1.5),
    context_scale: Range = (0.85, 1.0),
    least: int = 1,
) -> Context:
    """Draws target blocks, and a large square context block less all the targets.

    Sizes are drawn once for all images, places for each; an image whose context is left with fewer
    than `least` patches is drawn again.

    Args:
        random: Where all comes from.
        images: B.
        grid: Rows and columns.
        shown: S: of more patches that many are shown, chosen at random. Of 14×14 patches half of
            all contexts have 89 or more, nine in ten have 67 or more.
        targets: M.
        target_scale: Least and largest share of the grid that a target covers, before rounding.
        target_aspect: Least and largest height of a target, as a multiple of its width.
        context_scale: Least and largest share that the context block covers.
        least: Patches that each context has, at least.

    Raises:
        ValueError: If the targets leave too little in a thousand draws.

    References:
        Assran et al. 2023, "I-JEPA", section 3 and appendix A. https://arxiv.org/abs/2301.08243
        Its code never reaches the last row and column, draws scale and aspect from one number, and
        cuts all contexts to the smallest of the batch, from below.
    """
    patches = grid[0] * grid[1]
    target = _block_size(random, grid, target_scale, target_aspect)
    context = _block_size(random, grid, context_scale, (1.0, 1.0))
    aimed = np.zeros((images, targets, patches), bool)
    seen = np.zeros((images, patches), bool)
    for _ in range(1000):
        again = np.flatnonzero(seen.sum(axis=1) < least)
        if not again.size:
            break
        aimed[again] = _blocks(random, (again.size, targets), grid, target)
        seen[again] = _blocks(random, (again.size,), grid, context) & ~aimed[again].any(axis=1)
    else:
        raise ValueError(
            f"{targets} targets of {target[0]}×{target[1]} leave fewer than least={least} patches "
            f"of a grid of {grid[0]}×{grid[1]}."
        )
    most = _most_in_block(grid, target_scale, target_aspect)
    return Context(indices(seen, shown, random), indices(aimed, most))


def tubes(
    random: np.random.Generator,
    images: int,
    grid: tuple[int, int, int],
    *,
    blocks: int = 8,
    scale: float = 0.15,
    aspect: Range = (0.75, 1.5),
) -> Bool[np.ndarray, "B P"]:
    """Hides the union of blocks, the same in all frames; True where a patch is hidden.

    A video of which nothing is left is drawn again. The defaults are the short-range masks;
    `blocks=2, scale=0.7` are the long-range ones.

    Args:
        random: Where all comes from.
        images: B, videos.
        grid: Frames, rows and columns; patches are numbered by frames, then rows.
        blocks: How many blocks are drawn, which may overlap.
        scale: Share of a frame that a block covers, before rounding.
        aspect: Least and largest height of a block, as a multiple of its width.

    Raises:
        ValueError: If nothing is left of a video in a thousand draws.

    References:
        Bardes et al. 2024, "Revisiting feature prediction", section 3.2.
        https://arxiv.org/abs/2404.08471
    """
    frames, *frame = grid
    size = _block_size(random, (frame[0], frame[1]), (scale, scale), aspect)
    mask = np.ones((images, frame[0] * frame[1]), bool)
    for _ in range(1000):
        again = np.flatnonzero(mask.all(axis=1))
        if not again.size:
            return np.tile(mask, (1, frames))
        drawn = _blocks(random, (again.size, blocks), (frame[0], frame[1]), size)
        mask[again] = drawn.any(axis=1)
    raise ValueError(
        f"{blocks} blocks of {size[0]}×{size[1]} leave nothing of {frame[0]}×{frame[1]} patches."
    )


def blockwise(
    random: np.random.Generator,
    images: int,
    grid: Grid,
    *,
    share: float = 0.5,
    rates: Range = (0.1, 0.5),
    smallest: int = 4,
    aspect: float = 0.3,
) -> Bool[np.ndarray, "B P"]:
    """Hides blocks of some images' patches, and nothing of the others; True where hidden.

    Of the images that are hidden from, each is at another rate, evenly over `rates`: `floor(P *
    rate)` patches or a few less, where no further block fits; in flat grids, as of 2×32, of which
    few blocks are no higher, many less.

    Args:
        random: Where all comes from.
        images: B.
        grid: Rows and columns.
        share: Of the images that are hidden from, rounded down.
        rates: Least and largest share of an image's patches that is hidden.
        smallest: Patches of a block, at least, while that many are to be hidden.
        aspect: Least height of a block, as a multiple of its width; one over it is the largest.

    References:
        Bao et al. 2022, "BEiT", algorithm 1. https://arxiv.org/abs/2106.08254
        Oquab et al. 2024, "DINOv2", appendix B. https://arxiv.org/abs/2304.07193
    """
    chosen = int(images * share)
    edges = np.linspace(*rates, chosen + 1)
    counts = np.zeros(images, int)
    counts[:chosen] = grid[0] * grid[1] * random.uniform(edges[:-1], edges[1:])
    mask = np.stack(
        [_union(random, grid, n, smallest, aspect).reshape(-1) for n in counts.tolist()]
    )
    return mask[random.permutation(images)]


def indices(
    mask: Bool[np.ndarray, "*B P"], size: int, random: np.random.Generator | None = None
) -> Int[np.ndarray, "*B {size}"]:
    """Names the places where a mask is True, ascending, and fills up with P.

    Args:
        mask: Which patches to name.
        size: How many indices each row has.
        random: Which of more than `size` places are named, all alike.

    Raises:
        ValueError: If a row has more than `size` places and `random` is None.
    """
    patches, most = mask.shape[-1], int(mask.sum(axis=-1).max(initial=0))
    if random is None and most > size:
        raise ValueError(f"{most} patches of a mask do not fit into size={size} indices.")
    draw = np.zeros(mask.shape) if random is None else random.random(mask.shape)
    places = np.argsort(np.where(mask, draw, 1.0), axis=-1, kind="stable")[..., :size]
    named = np.where(np.take_along_axis(mask, places, axis=-1), places, patches)
    spare = np.full((*mask.shape[:-1], max(0, size - patches)), patches)
    return np.sort(np.concatenate([named, spare], axis=-1), axis=-1).astype(np.int32)


def _block_size(random: np.random.Generator, grid: Grid, scale: Range, aspect: Range) -> Grid:
    area = int(grid[0] * grid[1] * random.uniform(*scale))
    ratio = random.uniform(*aspect)
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if height > grid[0]:  # in a flat grid it grows in width instead
        height, width = grid[0], round(area / grid[0])
    elif width > grid[1]:
        height, width = round(area / grid[1]), grid[1]
    return min(max(height, 1), grid[0]), min(max(width, 1), grid[1])


def _most_in_block(grid: Grid, scale: Range, aspect: Range) -> int:
    """Bounds the patches of `_block_size`: each side is rounded up by a half at most."""
    root = math.sqrt(grid[0] * grid[1] * scale[1])
    perimeter = max(math.sqrt(ratio) + 1 / math.sqrt(ratio) for ratio in aspect)
    return min(grid[0] * grid[1], max(1, int(root**2 + root * perimeter / 2 + 0.25)))


def _blocks(
    random: np.random.Generator, shape: tuple[int, ...], grid: Grid, size: Grid
) -> Bool[np.ndarray, "*B P"]:
    """Places blocks of one size, each anywhere in its grid with the same probability."""
    inside = []
    for length, extent in zip(grid, size):
        first = random.integers(0, length - extent, (*shape, 1), endpoint=True)
        inside.append((np.arange(length) >= first) & (np.arange(length) < first + extent))
    return (inside[0][..., :, None] & inside[1][..., None, :]).reshape(*shape, -1)


def _union(
    random: np.random.Generator, grid: Grid, count: int, smallest: int, aspect: float
) -> Bool[np.ndarray, "rows columns"]:
    mask, tries, bound = np.zeros(grid, bool), 0, abs(math.log(aspect))
    while mask.sum() < count and tries < _TRIES:
        left, tries = count - mask.sum(), tries + 1
        area = random.uniform(min(smallest, left), left)
        ratio = math.exp(random.uniform(-bound, bound))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height > grid[0] or width > grid[1]:
            continue
        top, side = (
            random.integers(0, n, endpoint=True) for n in (grid[0] - height, grid[1] - width)
        )
        block = mask[top : top + height, side : side + width]
        if 0 < (~block).sum() <= left:
            block[:], tries = True, 0
    return mask
