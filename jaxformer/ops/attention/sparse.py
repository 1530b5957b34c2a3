"""Attention under the patterns of Child et al. 2019 at a cost of n√n instead of n².

A pattern touches almost every tile that a kernel would compute: each of them holds a column of
summaries, or a multiple of the stride. So it is cut into parts whose keys are disjoint and which
are full once their rows are put together; `flash.attend` computes each, `flash.merge` joins them.

    from jaxformer.ops import attention
    from jaxformer.ops.attention import sparse

    y = sparse.attend(q, k, v, attention.local_global(64) & attention.causal())
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.attention import blocks, flash, masks
from jaxformer.ops.attention.dense import check_arguments
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array, Float


class Split(NamedTuple):
    """A pattern that `attend` can cut.

    Attributes:
        block: Length of a block, or the stride.
        summary: Summaries at the end of each block; 0 if the pattern is strided.
        causal: Whether no query looks ahead.
    """

    block: int
    summary: int
    causal: bool


class Part(NamedTuple):
    """Some of the keys of each query, as a smaller attention.

    Attributes:
        rows: Rows of its batch for each row of the whole batch.
        queries: Queries in a row.
        keys: Keys in a row.
        mask: Who may look where in a row.
        lengths: Keys of each row that are no padding; all if None.
    """

    rows: int
    queries: int
    keys: int
    mask: Mask | None
    lengths: np.ndarray | None = None


def splits(mask: Mask | None) -> Split | None:
    """Recognises `local_global(...)` and `strided(...)`, alone or joined by `&` with `causal()`.

    Returns:
        None for every other mask, and for those with an offset; so it serves as a condition.
    """
    if mask is None or jax.tree.leaves(mask):
        return None
    joined = [mask.left, mask.right] if isinstance(mask, masks.And) else [mask]
    patterns = [part for part in joined if part != masks.causal()]
    if len(patterns) != 1 or not isinstance(patterns[0], masks.Or):
        return None
    causal, rest = len(joined) == 2, patterns[0].right
    if isinstance(rest, masks.Summaries):
        expected = masks.local_global(rest.block, rest.count)
        found = Split(rest.block, rest.count, causal)
    elif isinstance(rest, masks.Stride):
        expected, found = masks.strided(rest.stride), Split(rest.stride, 0, causal)
    else:
        return None
    return found if patterns[0] == expected else None


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None,
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Means what `flash.attend` means, for the masks that `splits` recognises.

    With blocks, or a stride, of √T it costs T√T, in memory linear in T. Each part is rounded to the
    dtype of `q` before they are joined: with 16 bits that is a rounding more than `flash.attend`.

    Args:
        q: Queries; N a multiple of K.
        k: Keys; as many as queries.
        v: Values.
        mask: `local_global` or `strided`, alone or `& causal()`.
        scale: Factor of the dot products; H**-0.5 if None.
        softcap: Bound on the magnitude of logits; none if None.
        sinks: A logit for each head of a key without a value.
        implementation: Of `flash.attend`, for all parts.
        return_lse: Also return the logarithm of each row's sum of exponentials.

    Raises:
        ValueError: If shapes disagree, or there is no such implementation.
        NotImplementedError: If the mask is another, S is not T, or the implementation cannot.

    References:
        Child et al. 2019, "Sparse Transformers", section 4.3. https://arxiv.org/abs/1904.10509
    """
    check_arguments(q, k, v, softcap=softcap, sinks=sinks)
    split, (batch, length), num_keys = splits(mask), q.shape[:2], k.shape[1]
    if split is None:
        raise NotImplementedError(
            "sparse.attend honours local_global and strided without offset, alone or & causal(), "
            f"got {mask}."
        )
    if length != num_keys:
        raise NotImplementedError(f"sparse.attend needs S=T, got T={length}, S={num_keys}.")
    plan = parts(mask, length) if length else {}
    if len(plan) < 2:  # one block at most
        return flash.attend(
            q,
            k,
            v,
            masks.causal() if split.causal else None,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            implementation=implementation,
            return_lse=return_lse,
        )
    block, count = split.block, plan["own"].rows
    in_blocks = [_padded(x, 1, 0, count * block - length) for x in (q, k, v)]
    q_cut, k_cut, v_cut = (x.reshape(batch, count, block, *x.shape[2:]) for x in in_blocks)

    def look(name: str, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Attends in a part, given as B (rows) (positions) N H; so are the results."""
        part = plan[name]
        mask = part.mask
        if part.lengths is not None:
            real = masks.key_lengths(jnp.tile(jnp.asarray(part.lengths, jnp.int32), batch))
            mask = real if mask is None else mask & real
        out, lse = flash.attend(
            *(x.reshape(batch * part.rows, *x.shape[2:]) for x in (q, k, v)),
            mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks if name == "own" else None,
            implementation=implementation,
            return_lse=True,
        )
        out, lse = (x.reshape(batch, part.rows, *x.shape[1:]) for x in (out, lse))
        return out, lse

    def joined(out: Array, lse: Array, before: int = 0, after: int = 0) -> tuple[Array, Array]:
        """Blocks put in a row again; those before and after them that the part lacks see none."""
        out, lse = _padded(out, 1, before, after), _padded(lse, 1, before, after, -jnp.inf)
        out, lse = (x.reshape(batch, -1, *x.shape[3:])[:, :length] for x in (out, lse))
        return out, lse

    found = [joined(*look("own", q_cut, k_cut, v_cut))]
    if split.summary:
        k_ends, v_ends = (
            x[:, :, block - split.summary :].reshape(batch, 1, -1, *x.shape[3:])
            for x in (k_cut, v_cut)
        )
        keys = plan["summaries"].keys
        seen = look("summaries", q[:, None], k_ends[:, :, :keys], v_ends[:, :, :keys])
        found.append(joined(*seen))
    else:
        found.append(joined(*look("before", q_cut[:, 1:], k_cut[:, :-1], v_cut[:, :-1]), before=1))
        if not split.causal:
            seen = look("after", q_cut[:, :-1], k_cut[:, 1:], v_cut[:, 1:])
            found.append(joined(*seen, after=1))
        out, lse = look("columns", *(x.swapaxes(1, 2) for x in (q_cut, k_cut, v_cut)))
        found.append(joined(out.swapaxes(1, 2), lse.swapaxes(1, 2)))
    out, lse = flash.merge(*found)
    return (out, lse) if return_lse else out


def parts(mask: Mask | None, length: int) -> dict[str, Part]:
    """Cuts a pattern over `length` positions into attentions that share no pair.

    "own" is each block by itself. Then there are the "summaries" of other blocks; or what the band
    reaches of the blocks "before" and "after", and the "columns" of positions that are equal modulo
    the stride. A mask that does not split is one part, the "whole".
    """
    split = splits(mask)
    if split is None:
        return {"whole": Part(1, length, length, mask)}
    causal = split.causal
    count = -(-length // split.block)
    block = min(split.block, length)
    own = masks.causal() if causal else None
    last = length - (count - 1) * block
    ragged = None if causal or last == block else np.append(np.full(count - 1, block), last)
    plan = {"own": Part(count, block, block, own, ragged)}
    if count == 1:
        return plan
    past, future = masks.window(None, -1), masks.window(-1, None)
    others = past if causal else past | future
    if split.summary:
        keys = (count - 1) * split.summary
        if not causal:
            keys += max(last - (block - split.summary), 0)
        plan["summaries"] = Part(1, length, keys, masks.coarse(others, block, split.summary))
        return plan
    # Position i of a block lies less than a stride behind position j of the next if j < i.
    plan["before"] = Part(count - 1, block, block, future)
    if not causal:
        plan["after"] = Part(count - 1, block, block, past, None if ragged is None else ragged[1:])
    whole = count - (np.arange(block) >= last)
    plan["columns"] = Part(block, count, count, others, None if ragged is None else whole)
    return plan


def flops(mask: Mask | None, length: int, head_dim: int, *, block: int = 512) -> int:
    """Counts what both products of one head take, forward, in the tiles that are not empty.

    A tile is `block` queries by `block` keys, or what there is of them; all of it is computed, at
    4·H operations a pair. For a mask that does not split it is the count of `flash.attend`.

    Args:
        mask: Who may look where; what its arrays say is disregarded.
        length: T and S.
        head_dim: H of keys and of values.
        block: Side of a tile.
    """
    pairs = 0
    for part in parts(mask, length).values():
        queries, keys = min(block, part.queries), min(block, part.keys)
        kinds = blocks.kinds(part.mask, part.queries, part.keys, queries, keys, static=True)
        pairs += part.rows * int((kinds[0, 0] != blocks.SKIP).sum()) * queries * keys
    return 4 * head_dim * pairs


def _padded(x: Array, axis: int, before: int, after: int, value: float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths, constant_values=value) if before or after else x
