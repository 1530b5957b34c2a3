"""The backward kernel for TPU: all three gradients in one pass over the pairs of blocks, by key.

Tiles of logits are keys by queries, so that what belongs to a query is a row that costs no lanes to
spread, and five products suffice. Gradients are accumulated with their channels first: each product
then has the side of a cell for its width, which fills a matrix unit of 256 as channels would not.
The gradients of all queries of a key head stay in vector memory; where they would not fit, the
caller goes over the queries in several parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.attention import _flash_tpu_steps as steps_of
from jaxformer.ops.attention._flash_tpu_forward import allowed, cleared, dot, positions
from jaxformer.ops.attention._flash_tpu_steps import LOG2E, Cut
from jaxformer.ops.attention.blocks import MASKED
from jaxformer.ops.attention.masks import Mask, leaf_axes
from jaxformer.typing import Array, DTypeLike


def backward(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    d_out: Array,
    rows: Array,
    *,
    bias: Array | None,
    scale: Any,
    softcap: float | None,
    cut: Cut,
    queries: range,
    vmem: int,
    dtype: DTypeLike,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Computes the gradients that some blocks of queries send.

    Args:
        q: Queries, B N T H, in float32 or bfloat16 like k, v and d_out.
        k: Keys, B K S H.
        v: Values, B K S Hv.
        mask: Canonical.
        d_out: Gradient of the output, B N T Hv.
        rows: For each query its log-sum-exp in base 2 (+inf if it may look nowhere), and the inner
            product that softmax subtracts; B N 2 T, float32.
        bias: #B #N #T #S.
        scale: A number, or an array of shape ().
        softcap: As in `dense.attend`.
        cut: Sizes of blocks and cells.
        queries: The blocks of queries.
        vmem: Bytes of vector memory that the kernel may use.
        dtype: Of the gradients of keys and values.
        interpret: As in `pl.pallas_call`.

    Returns:
        Gradients of those queries (filled up to whole blocks), of keys and of values.
    """
    batch, heads, query_length, channels = q.shape
    key_heads, key_length, value_channels = k.shape[1], k.shape[2], v.shape[3]
    group = heads // key_heads
    steps = steps_of.make(mask, query_length, key_length, cut, by="key", queries=queries)
    length = len(steps.fixed)
    lengths = (  # checks of existence, where they are due
        query_length if query_length % cut.query else None,
        key_length if key_length % cut.key else None,
    )

    def place(b, kv, step, g, fixed, code):
        n = kv * group + g
        return b, n, steps_of.moving(code[steps.of(b, n, step)]), fixed[step]

    def of_queries(*ids):
        b, n, i, _ = place(*ids)
        return b, n, i, 0

    def of_keys(b, kv, step, g, fixed, code):
        return b, kv, fixed[step], 0

    def of_rows(*ids):
        b, n, i, _ = place(*ids)
        return b, n, 0, i

    leaves = list(zip(leaf_axes(mask), jax.tree.leaves(mask)))
    if bias is not None:
        leaves.append(("BNTS", bias))
    tiles = steps_of.tiles(leaves, query_length, key_length, cut, place, keys_first=True)
    rows, row_size = steps_of.lane_padded(rows, cut.query)
    factor = scale * (LOG2E if softcap is None else 1 / softcap)
    traced = isinstance(scale, jax.Array)

    def kernel(fixed_ref, code_ref, *refs):
        number_ref, refs = (refs[0], refs[1:]) if traced else (None, refs)
        q_ref, k_ref, v_ref, d_out_ref, rows_ref, *refs = refs
        tile_refs, refs = refs[:-6], refs[-6:]
        dq_out, dk_out, dv_out, dq_ref, dk_ref, dv_ref = refs
        b, kv, step, g = (pl.program_id(axis) for axis in range(4))
        code = code_ref[steps.of(b, kv * group + g, step)]
        block = steps_of.moving(code)
        first_key = fixed_ref[step] * cut.key
        by = factor if number_ref is None else number_ref[0]
        final = scale if number_ref is None else number_ref[1]

        @pl.when((step == 0) & (g == 0))
        def _():
            def clear(g, at):
                dq_ref[g, :, at] = jnp.zeros((channels, cut.rows), jnp.float32)

            _over(dq_ref, clear, cut, queries)

        @pl.when(steps_of.is_first(code) & (g == 0))
        def _():
            dk_ref[...] = jnp.zeros_like(dk_ref)
            dv_ref[...] = jnp.zeros_like(dv_ref)

        def body(cells, pattern):
            def read(cell):
                at, to = steps_of.part(cell[0], cut.rows), steps_of.part(cell[1], cut.columns)
                query, d = q_ref[0, 0, at], d_out_ref[0, 0, at]
                key, value = k_ref[0, 0, to], v_ref[0, 0, to]
                if pattern[cell] == MASKED:
                    if lengths[0] is not None:
                        count = query_length - block * cut.query
                        query, d = (cleared(x, cell[0] * cut.rows, count) for x in (query, d))
                    if lengths[1] is not None:
                        count = key_length - first_key
                        key, value = (
                            cleared(x, cell[1] * cut.columns, count) for x in (key, value)
                        )
                return at, to, query, d, key, value

            def begin(cell):
                _, _, query, d, key, value = read(cell)
                return dot(key, query, 1, 1), dot(value, d, 1, 1)

            def end(cell, products):
                at, to, query, d, key, _ = read(cell)
                here = [load(ref, b, at, to) for load, ref in zip(tiles.load, tile_refs)]
                x = capped = products[0] * by
                if softcap is not None:
                    capped = jnp.tanh(x)
                    x = (softcap * LOG2E) * capped
                if bias is not None:
                    x = x + LOG2E * here[-1].astype(jnp.float32)
                p = jnp.exp2(x - rows_ref[0, 0, :1, at])
                change = products[1] - rows_ref[0, 0, 1:, at]
                if pattern[cell] == MASKED:
                    i, j = positions(cut, cell, block * cut.query, first_key, keys_first=True)
                    seen = allowed(mask, here, i, j, *lengths)
                    p = jnp.where(seen, p, 0.0)
                    if lengths[0] is not None:
                        change = jnp.where(seen, change, 0.0)
                ds = p * change
                if softcap is not None:
                    ds = ds * (1 - capped * capped)
                p, ds = p.astype(q.dtype), ds.astype(q.dtype)
                start = (block - queries.start) * cut.query + cell[0] * cut.rows
                within = pl.ds(pl.multiple_of(start, cut.rows), cut.rows)
                dv_ref[:, to] += dot(d, p, 0, 1)
                dk_ref[:, to] += dot(query, ds, 0, 1)
                dq_ref[g, :, within] += dot(key, ds, 0, 0)

            steps_of.interleaved(cells, cut.ahead, begin, end)

        steps_of.run(steps, cut, code, body)

        @pl.when(steps_of.is_last(code) & (g == group - 1))
        def _():
            dk_out[0, 0] = (dk_ref[...] * final).T.astype(dk_out.dtype)
            dv_out[0, 0] = dv_ref[...].T.astype(dv_out.dtype)

        @pl.when((step == length - 1) & (g == group - 1))
        def _():
            def write(g, at):
                dq_out[0, g, at] = (dq_ref[g, :, at] * final).T.astype(dq_out.dtype)

            _over(dq_ref, write, cut, queries)

    total = len(queries) * cut.query
    query_spec = pl.BlockSpec((1, 1, cut.query, channels), of_queries)
    key_spec = pl.BlockSpec((1, 1, cut.key, channels), of_keys)
    value_spec = pl.BlockSpec((1, 1, cut.key, value_channels), of_keys)
    in_specs = [
        query_spec,
        key_spec,
        value_spec,
        pl.BlockSpec((1, 1, cut.query, value_channels), of_queries),
        pl.BlockSpec((1, 1, 2, row_size), of_rows),
        *tiles.specs,
    ]
    arrays = [q, k, v, d_out, rows, *tiles.arrays]
    if traced:
        in_specs.insert(0, pl.BlockSpec(memory_space=pltpu.SMEM))
        arrays.insert(0, jnp.stack([factor, scale]).astype(jnp.float32))
    work = batch * heads * length * cut.query * cut.key
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, key_heads, length, group),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, group, total, channels), lambda b, kv, *_: (b, kv, 0, 0)),
                key_spec,
                value_spec,
            ],
            scratch_shapes=[
                pltpu.VMEM((group, channels, total), jnp.float32),
                pltpu.VMEM((channels, cut.key), jnp.float32),
                pltpu.VMEM((value_channels, cut.key), jnp.float32),
            ],
        ),
        out_shape=steps_of.results(
            arrays,
            ((batch, heads, total, channels), q.dtype),
            (k.shape, dtype),
            (v.shape, dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * (3 * channels + 2 * value_channels),
            transcendentals=work,
            bytes_accessed=2 * sum(x.size * x.dtype.itemsize for x in (q, k, v, d_out)),
        ),
        interpret=interpret,
        name="flash_backward",
    )(steps.fixed, steps.code, *arrays)


def _over(ref: Any, write: Any, cut: Cut, queries: range) -> None:
    """Goes over the cells of all queries, those of each head that shares the keys."""
    count = len(queries) * (cut.query // cut.rows)

    def one(n, carry):
        start = pl.multiple_of(n % count * cut.rows, cut.rows)
        write(n // count, pl.ds(start, cut.rows))
        return carry

    jax.lax.fori_loop(0, ref.shape[0] * count, one, None)
