"""Causal linear attention on TPU: chunks in VMEM, the state beside them, one pass over memory.

A program of the grid has a block of several chunks, of one key head or of a few whose channels fill
lanes, with all query heads that read them; blocks follow each other in time, and the state stays in
VMEM from one to the next. Heads are taken out of B T (N·H) as columns, so nothing is transposed.
The forward pass keeps the state at the start of each block for the backward pass, which goes from
the last block to the first and finds the states of the chunks inside again.

Narrow inputs are multiplied in bfloat16 and added in float32, wide ones multiplied in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.typing import Array

_LANES = 128
_NOTHING = 1e-30  # as in `linear`
_BODIES = 16  # chunks of a head in one program: more hide latency better, and compile longer
_VMEM = 8 * 2**20  # for the blocks of a program, half of the least that a chip allows by default


class _Plan(NamedTuple):
    """What a kernel is compiled for: sizes, and how the work is cut."""

    feature_map: Callable[[Array], Array] | None
    features: int  # F of one head
    values: int  # Hv of one head
    groups: int  # G, query heads that read one key head
    heads: int  # key heads in one program
    chunk: int
    chunks: int  # in one block
    backward_chunks: int


def attend(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    matrix: Array,
    total: Array,
    *,
    feature_map: Callable[[Array], Array] | None,
    chunk: int | None,
) -> tuple[Array, Array, Array]:
    """Mixes like `linear.attend` with `causal=True`, and returns the state after the last key.

    Args:
        q: B T N F.
        k: B T K F.
        v: B T K Hv.
        lengths: B; keys from there on add nothing.
        matrix: B K F Hv, of the state before.
        total: B K F.
        feature_map: Of each number by itself, to be computed here; None if q and k are features.
        chunk: A multiple of 128; by default as wide as the chip's matrix unit.

    Raises:
        NotImplementedError: For float64, and other chunks.
    """
    if jnp.float64 in (q.dtype, k.dtype, v.dtype):
        raise NotImplementedError("linear attention on TPU does not honour dtype=float64.")
    if chunk is not None and chunk % _LANES:
        raise NotImplementedError(f"linear attention on TPU needs 128 | chunk, got {chunk=}.")
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    dtype = jnp.bfloat16 if narrow else jnp.float32
    batch, length, num_heads, features = q.shape
    kv_heads, values = v.shape[2:]
    if feature_map is not None and features % (_LANES // 2):
        q = jnp.asarray(feature_map(q.astype(jnp.float32)))
        k = jnp.asarray(feature_map(k.astype(jnp.float32)))
        feature_map = None

    # What fills no lanes is filled up with zeros: features and values of zero add nothing.
    more = 0 if feature_map is not None else -features % _LANES
    more_values = -values % (_LANES // 2)
    plan = _plan(features + more, values + more_values, num_heads, kv_heads, chunk, dtype)
    plan = plan._replace(feature_map=feature_map)
    steps = -(-length // (plan.chunk * plan.chunks)) * plan.chunks * plan.chunk

    def columns(x: Array, more: int) -> Array:
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, steps - length), (0, 0), (0, more)])
        return x.reshape(batch, steps, -1)

    matrix = jnp.pad(matrix, [(0, 0), (0, 0), (0, more), (0, more_values)])
    total = jnp.pad(total, [(0, 0), (0, 0), (0, more)])[:, :, None]
    found: Any = _attend(
        plan,
        jnp.minimum(lengths, length).astype(jnp.int32),
        columns(q, more),
        columns(k, more),
        columns(v, more_values),
        matrix.astype(jnp.float32),
        total.astype(jnp.float32),
    )
    y, matrix, total = found
    y = y.reshape(batch, steps, num_heads, -1)[:, :length, :, :values]
    return y, matrix[:, :, :features, :values], total[:, :, 0, :features]


def _plan(
    features: int, values: int, num_heads: int, kv_heads: int, chunk: int | None, dtype: Any
) -> _Plan:
    if chunk is None:
        try:
            chunk = max(_LANES, pltpu.get_tpu_info().mxu_column_size)
        except ValueError:  # no TPU: interpreted
            chunk = _LANES
    groups = num_heads // kv_heads

    def fits(heads: int) -> bool:
        filled = heads * features % _LANES == 0 and heads * values % _LANES == 0
        return kv_heads % heads == 0 and (filled or heads == kv_heads)

    # Two heads at least: while one waits for its product, the other has work.
    sizes = [heads for heads in range(1, kv_heads + 1) if fits(heads)]
    heads = next((heads for heads in sizes if heads > 1), sizes[0])
    size = jnp.dtype(dtype).itemsize
    per_chunk = 2 * size * chunk * heads * (groups + 1) * (features + values)

    def chunks(arrays: int) -> int:
        """A power of two, so that blocks of one pass are whole blocks of the other."""
        most = min(_BODIES // (heads * groups), _VMEM // (arrays * per_chunk))
        return 1 << max(0, most.bit_length() - 1)

    return _Plan(None, features, values, groups, heads, chunk, chunks(1), chunks(2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, lengths, q, k, v, matrix, total):
    return _forward(plan, lengths, q, k, v, matrix, total, keep=False)[0]


def _forward(plan: _Plan, lengths, q, k, v, matrix, total, *, keep: bool = True):
    chunks = min(plan.chunks, plan.backward_chunks) if keep else plan.chunks
    call = _Call(plan, chunks, q.shape[0], q.shape[1], v.shape[2] // plan.values)
    states = call.state(matrix), call.state(total)
    starts = [call.per_block(matrix), call.per_block(total)] if keep else []
    found = call(
        _forward_kernel,
        [call.rows(q), call.rows(k), call.rows(v), *states],
        [call.rows(q, v), *states, *starts],
        "linear_forward",
    )(lengths, q, k, v, matrix, total)
    return found[:3], (lengths, q, k, v, found[0], *found[3:])


def _backward(plan: _Plan, saved, gradients):
    lengths, q, k, v, y, *starts = saved
    chunks = min(plan.chunks, plan.backward_chunks)
    call = _Call(plan, chunks, q.shape[0], q.shape[1], v.shape[2] // plan.values, reverse=True)
    change, for_matrix, for_total = gradients
    states = call.state(for_matrix), call.state(for_total)
    rows = [call.rows(x) for x in (q, k, v)]
    found = call(
        _backward_kernel,
        [*rows, call.rows(y), call.rows(y), *(call.per_block(x) for x in starts), *states],
        [*rows, *states],
        "linear_backward",
    )(lengths, q, k, v, y, change, *starts, for_matrix, for_total)
    return None, *found


_attend.defvjp(_forward, _backward)


class _Call:
    """Blocks and grid that both passes have in common."""

    def __init__(
        self, plan: _Plan, chunks: int, batch: int, steps: int, kv_heads: int, reverse: bool = False
    ) -> None:
        self.plan, self.chunks, self.reverse = plan, chunks, reverse
        self.block = chunks * plan.chunk
        self.programs = kv_heads // plan.heads
        self.grid = batch, self.programs, steps // self.block

    def _at(self, t):
        return self.grid[2] - 1 - t if self.reverse else t

    def rows(self, x: Array, wide_as: Array | None = None):
        """Columns of one program's heads in one block of time."""
        width = x.shape[2] if wide_as is None else wide_as.shape[2] * self.plan.groups
        shape = (*x.shape[:2], width)
        spec = pl.BlockSpec(
            (None, self.block, width // self.programs), lambda b, h, t, *_: (b, self._at(t), h)
        )
        return spec, jax.ShapeDtypeStruct(shape, x.dtype)

    def state(self, x: Array):
        """The states of one program's heads, the same block at all times."""
        spec = pl.BlockSpec((None, self.plan.heads, *x.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0))
        return spec, jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def per_block(self, x: Array):
        """The states at the start of each block."""
        one = x.shape[-2:]
        spec = pl.BlockSpec(
            (None, None, self.plan.heads, *one), lambda b, h, t, *_: (b, self._at(t), h, 0, 0)
        )
        shape = (self.grid[0], self.grid[2], self.grid[1] * self.plan.heads, *one)
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    def __call__(self, kernel, inputs: list, outputs: list, name: str):
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=self.grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
        )
        return pl.pallas_call(
            functools.partial(kernel, self.plan, self.chunks),
            grid_spec=grid_spec,
            out_shape=[shape for _, shape in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=name,
        )


def _forward_kernel(plan, chunks, lengths, q, k, v, matrix_in, total_in, y, matrix, total, *starts):
    @pl.when(pl.program_id(2) == 0)
    def first():
        matrix[...], total[...] = matrix_in[...], total_in[...]

    for kept, now in zip(starts, (matrix, total)):
        kept[...] = now[...]
    left = lengths[pl.program_id(0)] - pl.program_id(2) * chunks * plan.chunk
    past = _past(plan.chunk)
    states = [(matrix[h], total[h]) for h in range(plan.heads)]
    for i in range(chunks):
        rows = pl.ds(i * plan.chunk, plan.chunk)
        for h in range(plan.heads):
            m, z = states[h]
            at = k[rows, _columns(h, plan.features)]
            wide_keys, keys, _ = _map(plan, at, left - i * plan.chunk)
            values = v[rows, _columns(h, plan.values)]
            for n in range(h * plan.groups, (h + 1) * plan.groups):
                wide_queries, queries, _ = _map(plan, q[rows, _columns(n, plan.features)])
                weights = jnp.where(past, _dot(queries, keys, 1, 1), 0)
                mixed = _dot(weights.astype(values.dtype), values, 1, 0)
                mixed = mixed + _dot(queries, m.astype(values.dtype), 1, 0)
                weight = _row_sums(weights, wide_queries * z)
                y[rows, _columns(n, plan.values)] = (mixed * _inverse(weight)).astype(y.dtype)
            m = m + _dot(keys, values, 0, 0)
            states[h] = m, z + wide_keys.sum(0, keepdims=True)
    for h in range(plan.heads):
        matrix[h], total[h] = states[h]


def _backward_kernel(
    plan,
    chunks,
    lengths,
    q,
    k,
    v,
    y,
    change,
    starts,
    total_starts,
    after_in,
    after_total_in,
    for_q,
    for_k,
    for_v,
    after,
    after_total,
):
    """`after` is the gradient of the state at the end of a chunk, once it is done, at its start."""

    @pl.when(pl.program_id(2) == 0)
    def first():
        after[...], after_total[...] = after_in[...], after_total_in[...]

    block = pl.num_programs(2) - 1 - pl.program_id(2)
    left = lengths[pl.program_id(0)] - block * chunks * plan.chunk
    past = _past(plan.chunk)
    dtype = q.dtype
    each = [pl.ds(i * plan.chunk, plan.chunk) for i in range(chunks)]
    for h in range(plan.heads):
        value_columns = _columns(h, plan.values)
        m, z = starts[h], total_starts[h]
        states = []
        for i, rows in enumerate(each):
            states.append((m.astype(dtype), z))
            at = k[rows, _columns(h, plan.features)]
            wide_keys, keys, _ = _map(plan, at, left - i * plan.chunk)
            m = m + _dot(keys, v[rows, value_columns], 0, 0)
            z = z + wide_keys.sum(0, keepdims=True)

        m_after, z_after = after[h], after_total[h]
        for i, rows in reversed(list(enumerate(each))):
            m, z = states[i]
            at = k[rows, _columns(h, plan.features)]
            _, keys, pull_keys = _map(plan, at, left - i * plan.chunk)
            values = v[rows, value_columns]
            narrow = m_after.astype(dtype)
            keys_change = _dot(values, narrow, 1, 1) + z_after
            values_change = _dot(keys, narrow, 1, 0)
            for n in range(h * plan.groups, (h + 1) * plan.groups):
                columns = _columns(n, plan.values)
                at = q[rows, _columns(n, plan.features)]
                wide_queries, queries, pull_queries = _map(plan, at)
                weights = jnp.where(past, _dot(queries, keys, 1, 1), 0)
                weight = _row_sums(weights, wide_queries * z)
                mixed_change = change[rows, columns].astype(jnp.float32) * _inverse(weight)
                weight_change = -_row_sums(mixed_change * y[rows, columns].astype(jnp.float32))
                mixed_change = mixed_change.astype(dtype)
                weights = weights.astype(dtype)
                weights_change = _dot(mixed_change, values, 1, 1) + weight_change
                weights_change = jnp.where(past, weights_change, 0).astype(dtype)
                queries_change = _dot(weights_change, keys, 1, 0) + _dot(mixed_change, m, 1, 1)
                queries_change = pull_queries(queries_change + weight_change * z)
                for_q[rows, _columns(n, plan.features)] = queries_change.astype(dtype)
                keys_change = keys_change + _dot(weights_change, queries, 0, 0)
                values_change = values_change + _dot(weights, mixed_change, 0, 0)
                m_after = m_after + _dot(queries, mixed_change, 0, 0)
                z_after = z_after + (wide_queries * weight_change).sum(0, keepdims=True)
            for_k[rows, _columns(h, plan.features)] = pull_keys(keys_change).astype(dtype)
            for_v[rows, value_columns] = values_change.astype(dtype)
        after[h], after_total[h] = m_after, z_after


def _map(plan: _Plan, x: Array, left=None) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Features in float32 and as they are multiplied, and what takes a gradient back to `x`.

    Rows from `left` on are padding, and their features zero.
    """

    def masked(y: Array) -> Array:
        if left is None:
            return y
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) < left, y, 0)

    wide = x.astype(jnp.float32)
    if plan.feature_map is None:
        y = masked(wide)
        return y, y.astype(x.dtype), masked
    y, pull = jax.vjp(plan.feature_map, wide)
    y = masked(y)
    return y, y.astype(x.dtype), lambda change: pull(masked(change))[0]


def _past(chunk: int) -> Array:
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    return query >= key


def _columns(head: int, width: int):
    return pl.ds(head * width, width)


def _dot(one: Array, other: Array, axis: int, other_axis: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    axes = (((axis,), (other_axis,)), ((), ()))
    return jax.lax.dot_general(
        one, other, axes, precision=precision, preferred_element_type=jnp.float32
    )


def _row_sums(*arrays: Array) -> Array:
    """Sums over columns of all arrays: first lane by lane, so that lanes are added up but once."""
    if any(x.shape[1] % _LANES for x in arrays):
        return functools.reduce(jnp.add, (x.sum(1, keepdims=True) for x in arrays))
    lanes = [x[:, at : at + _LANES] for x in arrays for at in range(0, x.shape[1], _LANES)]
    return functools.reduce(jnp.add, lanes).sum(1, keepdims=True)


def _inverse(weight: Array) -> Array:
    return 1 / jnp.where(weight < _NOTHING, jnp.inf, weight)
