"""The forward kernel for TPU: attention of one block of queries over its list of blocks of keys.

Tiles of logits are queries by keys, in base 2. A row keeps its largest logit so far, repeated along
the 128 lanes, and 128 partial sums, so that only the maximum ever crosses lanes; the sums do once,
at the end of the list.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.attention import _flash_tpu_steps as steps_of
from jaxformer.ops.attention._flash_tpu_steps import LANES, LOG2E, Cut
from jaxformer.ops.attention.blocks import MASKED
from jaxformer.ops.attention.masks import Mask, leaf_axes
from jaxformer.typing import Array

LOWEST = -1e38  # where maxima begin: below any logit, above -inf, so that differences are no NaN


def forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    bias: Array | None,
    scale: Any,
    softcap: float | None,
    sinks: Array | None,
    cut: Cut,
    vmem: int,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Computes attention and its log-sum-exp.

    Args:
        q: Queries, B N T H, in float32 or bfloat16 like k and v.
        k: Keys, B K S H.
        v: Values, B K S Hv.
        mask: Canonical.
        bias: #B #N #T #S.
        scale: A number, or an array of shape ().
        softcap: As in `dense.attend`.
        sinks: N, float32.
        cut: Sizes of blocks and cells.
        vmem: Bytes of vector memory that the kernel may use.
        interpret: As in `pl.pallas_call`.

    Returns:
        B N T Hv in the dtype of q, and B N T float32.
    """
    batch, heads, query_length, channels = q.shape
    key_heads, key_length, value_channels = k.shape[1], k.shape[2], v.shape[3]
    group = heads // key_heads
    steps = steps_of.make(mask, query_length, key_length, cut)
    length = len(steps.fixed)
    keys = key_length if key_length % cut.key else None  # a check of existence, where one is due

    def place(b, n, step, fixed, code):
        return b, n, fixed[step], steps_of.moving(code[steps.of(b, n, step)])

    def of_queries(*ids):
        b, n, i, _ = place(*ids)
        return b, n, i, 0

    def of_keys(*ids):
        b, n, _, j = place(*ids)
        return b, n // group, j, 0

    def of_rows(*ids):
        b, n, i, _ = place(*ids)
        return b, n, 0, i

    leaves = list(zip(leaf_axes(mask), jax.tree.leaves(mask)))
    if bias is not None:
        leaves.append(("BNTS", bias))
    tiles = steps_of.tiles(leaves, query_length, key_length, cut, place)
    numbers, factor, sink_at = _numbers(scale, softcap, sinks)
    row_blocks = -(-query_length // cut.query)
    row_size = cut.query if row_blocks > 1 else -(-cut.query // LANES) * LANES

    def kernel(fixed_ref, code_ref, *refs):
        number_ref, refs = (refs[0], refs[1:]) if numbers is not None else (None, refs)
        q_ref, k_ref, v_ref, *refs = refs
        tile_refs, (out_ref, lse_ref, m_ref, l_ref, acc_ref) = refs[:-5], refs[-5:]
        b, n, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        code = code_ref[steps.of(b, n, step)]
        first_query = fixed_ref[step] * cut.query
        first_key = steps_of.moving(code) * cut.key
        by = steps_of.scalar(number_ref, factor)

        @pl.when(steps_of.is_first(code))
        def _():
            m_ref[...] = jnp.full_like(m_ref, LOWEST)
            l_ref[...] = jnp.zeros_like(l_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)
            if number_ref is not None and sinks is not None:
                sink = jnp.full_like(m_ref, number_ref[sink_at + n])
                m_ref[...] = jnp.maximum(sink, LOWEST)
                lane = jax.lax.broadcasted_iota(jnp.int32, sink.shape, 1)
                l_ref[...] = jnp.where(lane == 0, jnp.exp2(sink - m_ref[...]), 0.0)

        def body(cells, pattern):
            def slices(cell):
                return steps_of.part(cell[0], cut.rows), steps_of.part(cell[1], cut.columns)

            def begin(cell):
                rows, columns = slices(cell)
                return dot(q_ref[0, 0, rows], k_ref[0, 0, columns], 1, 1)

            def end(cell, products):
                rows, columns = slices(cell)
                here = [load(ref, b, rows, columns) for load, ref in zip(tiles.load, tile_refs)]
                x = _logits(products, by, softcap)
                if bias is not None:
                    x = x + LOG2E * here[-1].astype(jnp.float32)
                value = v_ref[0, 0, columns]
                if pattern[cell] == MASKED:
                    i, j = positions(cut, cell, first_query, first_key)
                    x = jnp.where(allowed(mask, here, i, j, None, keys), x, -jnp.inf)
                    if keys is not None:
                        value = cleared(value, cell[1] * cut.columns, key_length - first_key)
                m = m_ref[rows]
                largest = jnp.maximum(m, x.max(axis=1, keepdims=True))
                p = jnp.exp2(x - steps_of.spread(largest, x.shape[1]))
                fade = jnp.exp2(m - largest)
                m_ref[rows] = largest
                l_ref[rows] = fade * l_ref[rows] + _partial_sums(p)
                product = dot(p.astype(v_ref.dtype), value, 1, 0)
                acc_ref[rows] = steps_of.spread(fade, value_channels) * acc_ref[rows] + product

            steps_of.interleaved(cells, cut.ahead, begin, end)

        steps_of.run(steps, cut, code, body)

        @pl.when(steps_of.is_last(code))
        def _():
            total = l_ref[...].sum(axis=1, keepdims=True)
            lse = m_ref[...] / LOG2E + jnp.log(total)
            lse = jnp.where(total == 0, -jnp.inf, lse)
            lse = lse.T[:1]
            if row_size > cut.query:
                lse = jnp.pad(lse, ((0, 0), (0, row_size - cut.query)))
            lse_ref[0, 0] = lse
            out = acc_ref[...] / jnp.where(total == 0, 1.0, total)
            out_ref[0, 0] = out.astype(out_ref.dtype)

    in_specs = [
        pl.BlockSpec((1, 1, cut.query, channels), of_queries),
        pl.BlockSpec((1, 1, cut.key, channels), of_keys),
        pl.BlockSpec((1, 1, cut.key, value_channels), of_keys),
        *tiles.specs,
    ]
    arrays = [q, k, v, *tiles.arrays]
    if numbers is not None:
        in_specs.insert(0, pl.BlockSpec(memory_space=pltpu.SMEM))
        arrays.insert(0, numbers)
    row_length = query_length if row_blocks > 1 else row_size
    work = batch * heads * length * cut.query * cut.key
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, length),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, cut.query, value_channels), of_queries),
                pl.BlockSpec((1, 1, 1, row_size), of_rows),
            ],
            scratch_shapes=[
                pltpu.VMEM((cut.query, LANES), jnp.float32),
                pltpu.VMEM((cut.query, LANES), jnp.float32),
                pltpu.VMEM((cut.query, value_channels), jnp.float32),
            ],
        ),
        out_shape=steps_of.results(
            arrays,
            ((batch, heads, query_length, value_channels), q.dtype),
            ((batch, heads, 1, row_length), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * (channels + value_channels),
            transcendentals=work,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v))
            + batch * heads * query_length * value_channels * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="flash_forward",
    )(steps.fixed, steps.code, *arrays)
    return out, lse[:, :, 0, :query_length]


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contracts two matrices in their own precision, accumulating in float32."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def positions(cut: Cut, cell: tuple, first_query: Any, first_key: Any, keys_first: bool = False):
    """The positions of a cell's queries and keys, along the axes that they have in a tile."""
    shapes = ((1, cut.rows), (cut.columns, 1)) if keys_first else ((cut.rows, 1), (1, cut.columns))
    axes = (1, 0) if keys_first else (0, 1)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, s, axis) for s, axis in zip(shapes, axes))
    return first_query + cell[0] * cut.rows + i, first_key + cell[1] * cut.columns + j


def allowed(
    mask: Mask | None, here: list, i: Array, j: Array, queries: int | None, keys: int | None
) -> Array:
    """Where a tile may look: by the mask, and below the number of queries and of keys if given."""
    seen = []
    if mask is not None:
        treedef = jax.tree.structure(mask)
        seen.append(jax.tree.unflatten(treedef, here[: treedef.num_leaves]).tile(i, j))
    if queries is not None:
        seen.append(i < queries)
    if keys is not None:
        seen.append(j < keys)
    shape = jnp.broadcast_shapes(i.shape, j.shape)
    return functools.reduce(operator.and_, (jnp.broadcast_to(part, shape) for part in seen))


def cleared(block: Array, start: int, count: Any) -> Array:
    """Zeros in place of rows that do not exist, whatever memory holds there."""
    row = start + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    wide = jnp.where(row < count, block.astype(jnp.float32), 0.0)
    return wide.astype(block.dtype)


def _logits(products: Array, factor: Any, softcap: float | None) -> Array:
    """Logits in base 2."""
    if softcap is None:
        return products * factor
    return (softcap * LOG2E) * jnp.tanh(products * factor)


def _numbers(scale: Any, softcap: float | None, sinks: Array | None):
    """What goes to scalar memory, the factor of products or its index there, and where sinks are.

    Products times the factor are logits in base 2, or the argument of tanh.
    """
    factor = scale * (LOG2E if softcap is None else 1 / softcap)
    parts, at = [], factor
    if isinstance(factor, jax.Array):
        parts.append(factor.astype(jnp.float32).reshape(1))
        at = 0
    if sinks is not None:
        parts.append(sinks.astype(jnp.float32) * LOG2E)
    if not parts:
        return None, float(at), 0
    return jnp.concatenate(parts), at if at is not factor else float(factor), len(parts) - 1


def _partial_sums(p: Array) -> Array:
    """Sums of rows as 128 numbers each, in the lanes where they lie."""
    if p.shape[1] % LANES == 0:
        parts = (p[:, n : n + LANES] for n in range(0, p.shape[1], LANES))
        return functools.reduce(operator.add, parts)
    lane = jax.lax.broadcasted_iota(jnp.int32, (p.shape[0], LANES), 1)
    return jnp.where(lane == 0, p.sum(axis=1, keepdims=True), 0.0)
