"""Causal linear attention on GPU, by Pallas for Triton: everything parallel, the state by segment.

Time is cut into segments, and a segment into chunks. One kernel sums `φ(k) vᵀ` and `φ(k)` of every
segment, all at once; XLA adds the sums up to the state at each segment's start; and another gives
each chunk of queries the chunks before it in its segment, and the state for what lies further back.
The gradient goes the same way: sums of `φ(q) dyᵀ` from behind, then one kernel for queries and one
for keys and values. Only the sums and one weight a query are kept besides the inputs.

Narrow inputs are multiplied in bfloat16 and added in float32, wide ones multiplied in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.typing import Array

_NOTHING = 1e-30  # as in `linear`
_LARGEST = 256  # features or values of a head that a chunk can hold in registers
_COLUMNS = 64  # features of the state that a program holds at a time
_CHUNKS = 8  # in a segment


class _Plan(NamedTuple):
    """What a kernel is compiled for."""

    feature_map: Callable[[Array], Array] | None
    chunk: int
    groups: int  # G, query heads that read one key head


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
        chunk: A power of two from 16 to 128.

    Raises:
        NotImplementedError: For float64, other chunks, more than 256 features or values, and where
            JAX has no Triton.
    """
    if jnp.float64 in (q.dtype, k.dtype, v.dtype):
        raise NotImplementedError("linear attention on GPU does not honour dtype=float64.")
    if chunk not in (None, 16, 32, 64, 128):
        raise NotImplementedError(f"linear attention on GPU needs chunk in 16..128, got {chunk=}.")
    for name, size in (("F", q.shape[3]), ("Hv", v.shape[3])):
        if size > _LARGEST:
            raise NotImplementedError(
                f"linear attention on GPU holds {_LARGEST} channels, got {name}={size}."
            )
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    dtype = jnp.bfloat16 if narrow else jnp.float32
    _, length, num_heads, features = q.shape
    kv_heads, values = v.shape[2:]
    more, more_values = (max(16, pl.next_power_of_2(n)) - n for n in (features, values))
    if feature_map is not None and more:  # what is filled up with zeros must have no features
        q = jnp.asarray(feature_map(q.astype(jnp.float32)))
        k = jnp.asarray(feature_map(k.astype(jnp.float32)))
        feature_map = None
    if chunk is None:
        chunk = 64 if narrow else 32
    plan = _Plan(feature_map, chunk, num_heads // kv_heads)
    filling = -length % (chunk * _CHUNKS)

    def filled(x: Array, more: int) -> Array:
        return jnp.pad(x.astype(dtype), [(0, 0), (0, filling), (0, 0), (0, more)])

    found: Any = _attend(
        plan,
        jnp.minimum(lengths, length).astype(jnp.int32),
        filled(q, more),
        filled(k, more),
        filled(v, more_values),
        jnp.pad(matrix, [(0, 0), (0, 0), (0, more), (0, more_values)]).astype(jnp.float32),
        jnp.pad(total, [(0, 0), (0, 0), (0, more)]).astype(jnp.float32),
    )
    y, matrix, total = found
    return y[:, :length, :, :values], matrix[:, :, :features, :values], total[:, :, :features]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, lengths, q, k, v, matrix, total):
    return _forward(plan, lengths, q, k, v, matrix, total)[0]


def _forward(plan: _Plan, lengths, q, k, v, matrix, total):
    sums = _segment_sums(plan, k, v, lengths)
    matrices, totals = (_running(x, start) for x, start in zip(sums, (matrix, total)))
    starts = matrices[:, :, :-1], totals[:, :, :-1]
    batch, length, heads, _ = q.shape
    call = _Call(plan, q, k)
    y, weight = call(
        _forward_kernel,
        [call.lengths(), call.chunk(q), call.segment(k), call.segment(v), *map(call.state, starts)],
        [call.chunk(q, v.shape[3]), call.vector()],
        [((*q.shape[:3], v.shape[3]), q.dtype), ((batch, heads, length), jnp.float32)],
        "linear_forward",
    )(lengths, q, k, v, *starts)
    return (y, matrices[:, :, -1], totals[:, :, -1]), (lengths, q, k, v, starts, y, weight)


def _backward(plan: _Plan, saved, gradients):
    lengths, q, k, v, starts, y, weight = saved
    change, for_matrix, for_total = gradients
    # Of y = mixed / weight: the gradient of mixed is inverse * change, of weight:
    inverse = 1 / jnp.where(weight < _NOTHING, jnp.inf, weight)
    along = jnp.einsum("BTNH,BTNH->BNT", change, y, preferred_element_type=jnp.float32)
    for_weight = -along * inverse

    sums = _segment_sums(plan._replace(groups=1), q, change, None, inverse, for_weight)
    batch, kv_heads, groups = q.shape[0], k.shape[2], plan.groups
    sums = (x.reshape(batch, kv_heads, groups, *x.shape[2:]).sum(2) for x in sums)
    behind = [
        _running(x[:, :, ::-1], end)[:, :, ::-1] for x, end in zip(sums, (for_matrix, for_total))
    ]
    after = [x[:, :, 1:] for x in behind]  # at the end of each segment

    call = _Call(plan, q, k)
    wide = [call.vector(), call.vector()]
    for_q = call(
        _queries_kernel,
        [
            call.lengths(),
            call.chunk(q),
            call.segment(k),
            call.segment(v),
            call.chunk(change),
            *wide,
            *map(call.state, starts),
        ],
        [call.chunk(q)],
        [(q.shape, q.dtype)],
        "linear_backward_queries",
    )(lengths, q, k, v, change, inverse, for_weight, *starts)[0]

    call = _Call(plan, k, k)
    for_k, for_v = call(
        _keys_kernel,
        [
            call.lengths(),
            call.group_segment(q),
            call.chunk(k),
            call.chunk(v),
            call.group_segment(change),
            call.group_vector(),
            call.group_vector(),
            *map(call.state, after),
        ],
        [call.chunk(k), call.chunk(v)],
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        "linear_backward_keys",
    )(lengths, q, k, v, change, inverse, for_weight, *after)
    return None, for_q, for_k, for_v, behind[0][:, :, 0], behind[1][:, :, 0]


_attend.defvjp(_forward, _backward)


def _running(sums: Array, start: Array) -> Array:
    """States at the start of every segment, and at the end of the last: B K segments + 1 ..."""
    return jnp.cumsum(jnp.concatenate([start[:, :, None], sums], axis=2), axis=2)


def _segment_sums(plan: _Plan, x: Array, y: Array, lengths, *scales) -> tuple[Array, Array]:
    """Sums of `φ(x) yᵀ` and `φ(x)` over each segment, for each head of x: B N segments F (Hv).

    Args:
        plan: How time is cut.
        x: B T N F.
        y: B T N Hv.
        lengths: Rows of x from there on add nothing; None if all do.
        *scales: Factors of the rows in the two sums; 1 if there are none.
    """
    batch, length, heads, features = x.shape
    values, segment = y.shape[3], plan.chunk * _CHUNKS
    columns = min(features, _COLUMNS)
    parts = features // columns
    rows = (None, segment, None)
    at = lambda s, n, b: (b, s // parts, n, s % parts)  # noqa: E731
    vector = pl.BlockSpec((None, None, segment), lambda s, n, b: (b, n, s // parts))
    state = (None, None, None, columns)
    shape = (batch, heads, length // segment, features)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    found = pl.pallas_call(
        functools.partial(_sums_kernel, plan, parts),
        grid=(parts * (length // segment), heads, batch),
        in_specs=[
            pl.BlockSpec((1,), lambda s, n, b: (b,)),
            pl.BlockSpec((*rows, columns), at),
            pl.BlockSpec((*rows, values), lambda s, n, b: (b, s // parts, n, 0)),
            *[vector for _ in scales],
        ],
        out_specs=[
            pl.BlockSpec((*state, values), lambda s, n, b: (b, n, s // parts, s % parts, 0)),
            pl.BlockSpec(state, lambda s, n, b: (b, n, s // parts, s % parts)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, values), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=_compiler_params(),
        name="linear_sums",
    )(lengths, x, y, *scales)
    return found[0], found[1]


class _Call:
    """A grid of chunks, heads of `x`, and rows of the batch; what a program reads and writes."""

    def __init__(self, plan: _Plan, x: Array, k: Array) -> None:
        self.plan = plan
        batch, length, heads, _ = x.shape
        self.grid = (length // plan.chunk, heads, batch)
        self.per_kv_head = heads // k.shape[2]

    def lengths(self):
        return pl.BlockSpec((1,), lambda j, n, b: (b,))

    def chunk(self, x: Array, width: int | None = None):
        """The program's own rows and head."""
        width = x.shape[3] if width is None else width
        return pl.BlockSpec((None, self.plan.chunk, None, width), lambda j, n, b: (b, j, n, 0))

    def segment(self, x: Array):
        """All rows of the segment, of the key head that a query head reads."""
        rows = (None, self.plan.chunk * _CHUNKS, None, x.shape[3])
        return pl.BlockSpec(rows, lambda j, n, b: (b, j // _CHUNKS, n // self.per_kv_head, 0))

    def group_segment(self, x: Array):
        """All rows of the segment, of all query heads that read a key head."""
        rows = (None, self.plan.chunk * _CHUNKS, self.plan.groups, x.shape[3])
        return pl.BlockSpec(rows, lambda j, n, b: (b, j // _CHUNKS, n, 0))

    def vector(self):
        """A number for each of the program's own rows."""
        return pl.BlockSpec((None, None, self.plan.chunk), lambda j, n, b: (b, n, j))

    def group_vector(self):
        """A number for each row of the segment and each query head that reads a key head."""
        rows = (None, self.plan.groups, self.plan.chunk * _CHUNKS)
        return pl.BlockSpec(rows, lambda j, n, b: (b, n, j // _CHUNKS))

    def state(self, x: Array):
        """What belongs to a whole segment and key head."""
        one = x.shape[3:]
        return pl.BlockSpec(
            (None, None, None, *one),
            lambda j, n, b: (b, n // self.per_kv_head, j // _CHUNKS, *(0 for _ in one)),
        )

    def __call__(self, kernel, inputs: list, outputs: list, shapes: list, name: str):
        return pl.pallas_call(
            functools.partial(kernel, self.plan),
            grid=self.grid,
            in_specs=inputs,
            out_specs=outputs,
            out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
            compiler_params=_compiler_params(),
            name=name,
        )


def _compiler_params() -> Any:
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        raise NotImplementedError("linear attention on GPU needs a JAX with Triton.") from None
    return triton.CompilerParams(num_warps=4, num_stages=2)


def _sums_kernel(plan, parts, lengths, x, y, *rest):
    *scales, matrix, total = rest
    segment = jax.lax.div(pl.program_id(0), parts)
    left = lengths[0] - segment * plan.chunk * _CHUNKS

    def add(i, sums):
        rows = pl.ds(i * plan.chunk, plan.chunk)
        wide, narrow, _ = _map(plan, x[rows, :], left - i * plan.chunk)
        values = y[rows, :]
        if scales:
            by_mixed, by_weight = (scale[rows][:, None] for scale in scales)
            values = (values.astype(jnp.float32) * by_mixed).astype(values.dtype)
            wide = wide * by_weight
        return sums[0] + _dot(narrow.T, values), sums[1] + wide.sum(0)

    start = jnp.zeros(matrix.shape, jnp.float32), jnp.zeros(total.shape, jnp.float32)
    matrix[...], total[...] = jax.lax.fori_loop(0, _CHUNKS, add, start)


def _forward_kernel(plan, lengths, q, k, v, m, z, y, weight_out):
    own = jax.lax.rem(pl.program_id(0), _CHUNKS)
    left = lengths[0] - (pl.program_id(0) - own) * plan.chunk
    queries = _map(plan, q[...])[1]

    def add(i, sums):
        rows = pl.ds(i * plan.chunk, plan.chunk)
        keys = _map(plan, k[rows, :], left - i * plan.chunk)[1]
        weights = jnp.where(_past(plan.chunk, own - i), _dot(queries, keys.T), 0)
        return sums[0] + _dot(weights.astype(v.dtype), v[rows, :]), sums[1] + weights.sum(1)

    start = jnp.zeros(y.shape, jnp.float32), jnp.zeros(weight_out.shape, jnp.float32)
    mixed, weight = jax.lax.fori_loop(0, own + 1, add, start)
    features = q.shape[1]
    for at in range(0, features, min(features, _COLUMNS)):
        columns = pl.ds(at, min(features, _COLUMNS))
        wide, narrow, _ = _map(plan, q[:, columns])
        mixed = mixed + _dot(narrow, m[columns, :].astype(narrow.dtype))
        weight = weight + (wide * z[columns][None]).sum(1)
    y[...] = (mixed / jnp.where(weight < _NOTHING, jnp.inf, weight)[:, None]).astype(y.dtype)
    weight_out[...] = weight


def _queries_kernel(plan, lengths, q, k, v, change, inverse, for_weight, m, z, for_q):
    own = jax.lax.rem(pl.program_id(0), _CHUNKS)
    left = lengths[0] - (pl.program_id(0) - own) * plan.chunk
    dtype = q.dtype
    mixed_change = (change[...].astype(jnp.float32) * inverse[...][:, None]).astype(dtype)
    weight_change = for_weight[...][:, None]

    def add(i, total):
        rows = pl.ds(i * plan.chunk, plan.chunk)
        keys = _map(plan, k[rows, :], left - i * plan.chunk)[1]
        weights_change = _dot(mixed_change, v[rows, :].T) + weight_change
        weights_change = jnp.where(_past(plan.chunk, own - i), weights_change, 0)
        return total + _dot(weights_change.astype(dtype), keys)

    far = _dot(mixed_change, m[...].astype(dtype).T) + weight_change * z[...][None]
    found = jax.lax.fori_loop(0, own + 1, add, far)
    for_q[...] = _map(plan, q[...])[2](found).astype(dtype)


def _keys_kernel(plan, lengths, q, k, v, change, inverse, for_weight, m, z, for_k, for_v):
    own = jax.lax.rem(pl.program_id(0), _CHUNKS)
    left = lengths[0] - pl.program_id(0) * plan.chunk
    dtype = k.dtype
    _, keys, pull = _map(plan, k[...], left)
    values = v[...]

    def add(at, sums):
        n, i = jax.lax.rem(at, plan.groups), own + jax.lax.div(at, plan.groups)
        rows = pl.ds(i * plan.chunk, plan.chunk)
        queries = _map(plan, q[rows, n, :])[1]
        mixed_change = change[rows, n, :].astype(jnp.float32) * inverse[n, rows][:, None]
        mixed_change = mixed_change.astype(dtype)
        past = _past(plan.chunk, i - own)
        weights = jnp.where(past, _dot(queries, keys.T), 0).astype(dtype)
        weights_change = _dot(mixed_change, values.T) + for_weight[n, rows][:, None]
        weights_change = jnp.where(past, weights_change, 0).astype(dtype)
        return sums[0] + _dot(weights_change.T, queries), sums[1] + _dot(weights.T, mixed_change)

    after = m[...].astype(dtype)
    start = _dot(values, after.T) + z[...][None], _dot(keys, after)
    keys_change, values_change = jax.lax.fori_loop(0, (_CHUNKS - own) * plan.groups, add, start)
    for_k[...] = pull(keys_change).astype(dtype)
    for_v[...] = values_change.astype(dtype)


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


def _past(chunk: int, ahead) -> Array:
    """Which keys no query of a chunk may miss that lies `ahead` chunks after theirs."""
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    return query + ahead * chunk >= key


def _dot(one: Array, other: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.dot(one, other, precision=precision, preferred_element_type=jnp.float32)
