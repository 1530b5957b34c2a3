"""Flash attention in Pallas for GPUs of several generations, through Triton.

A program owns a block of queries (of keys, for the gradients of keys and values) and walks the list
of blocks that the mask leaves of the other side: first those that it lets through whole, then those
that it cuts. Exponentials are powers of two, the factor log₂e being folded into the scale. The
backward pass is two kernels without atomic additions: the same numbers in each run.

JAX deprecates its Triton backend since 0.11: lowering warns, and `refuses` says so once it is gone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxformer.ops.attention import blocks
from jaxformer.ops.attention._xla_tiles import row_delta
from jaxformer.ops.attention.masks import Mask
from jaxformer.typing import Array, Float

try:
    from jax.experimental.pallas import triton
except ImportError:  # `refuses` says so
    triton = None

_LOG2E = math.log2(math.e)
_LOWEST = float(np.finfo(np.float32).min)


class BlockSizes(NamedTuple):
    """How a kernel is cut; rows are powers of two from 16.

    Attributes:
        outer: Rows that a program owns: queries, or keys for the gradients of keys and values.
        inner: Rows of the other side in each step of its loop.
        warps: Of 32 threads, for each program.
        stages: Steps whose rows are on their way from memory at the same time.
    """

    outer: int
    inner: int
    warps: int = 8
    stages: int = 2


class _Inputs(NamedTuple):
    """The arrays of a kernel, or its references to them; None for what there is not."""

    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    scale: Any  # None if it is known while tracing
    sinks: Any = None
    d_out: Any = None
    lse: Any = None  # of base 2
    delta: Any = None
    order: Any = None  # for each outer block the numbers of the inner ones, whole, then masked
    count: Any = None  # how many of them are whole, and how many masked


# Axes of the inputs: R is an outer block, t and s are T and S where they stay whole.
_AXES = _Inputs(
    q="BTNH",
    k="BSKH",
    v="BSKH",
    mask="BNts",
    bias="BNts",
    scale="1",
    sinks="N",
    d_out="BTNH",
    lse="BNT",
    delta="BNT",
    order="BNRC",
    count="BNRC",
)


class _Static(NamedTuple):
    """What a kernel knows while it is traced."""

    sizes: BlockSizes
    by_key: bool  # whether a program owns keys; tiles are transposed then
    group: int  # query heads that a program deals with
    key_length: int
    scale: float | None
    softcap: float | None
    kinds: tuple[bool, bool]  # whether there are whole, and masked blocks
    interpret: bool


def refuses(
    q: Any,
    k: Any,
    v: Any,
    mask: Mask | None,
    *,
    bias: Any,
    scale: Any,
    softcap: float | None,
    sinks: Any,
) -> str | None:
    """Says why a call is none for these kernels; None if it is one."""
    if triton is None:
        return f"jax {jax.__version__} has no Triton backend of Pallas any more"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"q, k and v must be all float32, bfloat16 or float16, got {name}: {x.dtype}"
    for name, size in (("B", q.shape[0]), ("T", q.shape[1]), ("S", k.shape[1])):
        if size < 1:
            return f"there is nothing to attend to, {name}={size}"
    for name, size in (("H", q.shape[3]), ("Hv", v.shape[3])):
        if not 1 <= size <= 256:
            return f"heads must have 1 to 256 channels, got {name}={size}"
    return None


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None,
    *,
    bias: Float[Array, "..."] | None,
    scale: float | Float[Array, ""],
    softcap: float | None,
    sinks: Float[Array, "N"] | None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attends as `dense.attend` does.

    Products accumulate in float32, and those of float32 are not rounded to TF32.

    Returns:
        The result in the dtype of `q`, and for each query the natural logarithm of the sum of its
        exponentials in float32, -inf if it may look nowhere.
    """
    sizes = block_sizes or default_sizes(q, v)
    given = _Inputs(q, k, v, mask, bias, scale, sinks)
    x, at = _prepared(given, sizes, softcap, interpret)
    batch, length, num_heads, _ = x.q.shape
    like_out = jax.ShapeDtypeStruct((batch, length, num_heads, x.v.shape[3]), q.dtype)
    like_lse = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    out, lse = _call(_forward_kernel, x, at, (("BTNH", like_out), ("BNT", like_lse)))
    return out[:, : q.shape[1], :, : v.shape[3]], lse[..., : q.shape[1]].swapaxes(1, 2)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Mask | None,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
    *,
    bias: Float[Array, "..."] | None,
    scale: float | Float[Array, ""],
    softcap: float | None,
    sinks: Float[Array, "N"] | None,
    bias_gradient: bool = False,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], None]:
    """Pulls the gradients of `out` and `lse`, which `forward` returned, back to q, k and v.

    Sinks are not looked at: they are in `lse` already.

    Raises:
        NotImplementedError: If the gradient of the bias is asked for.
    """
    if bias_gradient:
        raise NotImplementedError("the Triton kernels have no gradient for bias.")
    sizes = block_sizes or default_sizes(q, v, backward=True)
    delta = row_delta(out, d_out, d_lse, jnp.float32)
    # The weights of a query that may look nowhere are zero wherever it looks.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E).swapaxes(1, 2)
    given = _Inputs(q, k, v, mask, bias, scale, None, d_out, lse, delta.swapaxes(1, 2))

    x, at = _prepared(given, sizes, softcap, interpret)
    (d_q,) = _call(_query_kernel, x, at, (("BTNH", _like(x.q)),))
    x, at = _prepared(given, sizes, softcap, interpret, by_key=True)
    d_k, d_v = _call(_key_kernel, x, at, (("BSKH", _like(x.k)), ("BSKH", _like(x.v))))
    d_q, d_k, d_v = (
        found[:, : given.shape[1], :, : given.shape[3]]
        for found, given in ((d_q, q), (d_k, k), (d_v, v))
    )
    return d_q, d_k, d_v, None


# Kernels.


def _forward_kernel(x: _Inputs, outputs: Sequence[Any], at: _Static) -> None:
    out_ref, lse_ref = outputs
    outer, inner = at.sizes[:2]
    row, q = pl.program_id(0), x.q[:, 0]

    def step(column: Array, masked: bool, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, largest, total = carry
        rows = pl.ds(column * inner, inner)
        logits, unit, _ = _logits(x, at, _dot(q, x.k[rows], 1), row, column, 0, masked)
        new = jnp.maximum(largest, logits.max(axis=1) * unit)
        weights = _exp2(logits * unit - new[:, None], at.interpret)
        decay = _exp2(largest - new, at.interpret)
        total = total * decay + weights.sum(axis=1)
        acc = acc * decay[:, None] + _dot(weights.astype(q.dtype), x.v[rows], 0)
        return acc, new, total

    acc = jnp.zeros((outer, x.v.shape[1]), jnp.float32)
    if x.sinks is None:
        start = acc, jnp.full(outer, _LOWEST), jnp.zeros(outer)
    else:
        start = acc, jnp.full(outer, x.sinks[0] * _LOG2E), jnp.ones(outer)
    acc, largest, total = _walk(x, at, 0, step, start)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out_ref[:, 0] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[0] = jnp.where(empty, -jnp.inf, (largest + jnp.log2(total)) / _LOG2E)


def _query_kernel(x: _Inputs, outputs: Sequence[Any], at: _Static) -> None:
    (d_q_ref,) = outputs
    row, inner = pl.program_id(0), at.sizes.inner
    q, d_out, lse, delta = x.q[:, 0], x.d_out[:, 0], x.lse[0], x.delta[0]

    def step(column: Array, masked: bool, d_q: Array) -> Array:
        rows = pl.ds(column * inner, inner)
        k = x.k[rows]
        logits, unit, slope = _logits(x, at, _dot(q, k, 1), row, column, 0, masked)
        weights = _exp2(logits * unit - lse[:, None], at.interpret)
        d_logits = weights * (_dot(d_out, x.v[rows], 1) - delta[:, None]) * slope
        return d_q + _dot(d_logits.astype(k.dtype), k, 0)

    d_q = _walk(x, at, 0, step, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[:, 0] = (d_q * _scale(x, at)).astype(d_q_ref.dtype)


def _key_kernel(x: _Inputs, outputs: Sequence[Any], at: _Static) -> None:
    d_k_ref, d_v_ref = outputs
    row, inner = pl.program_id(0), at.sizes.inner
    k, v = x.k[...], x.v[...]

    def head(g: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(column: Array, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_k, d_v = carry
            rows = pl.ds(column * inner, inner)
            q, d_out, lse, delta = x.q[rows, g], x.d_out[rows, g], x.lse[g, rows], x.delta[g, rows]
            logits, unit, slope = _logits(x, at, _dot(k, q, 1), row, column, g, masked)
            weights = _exp2(logits * unit - lse[None, :], at.interpret)
            d_v = d_v + _dot(weights.astype(v.dtype), d_out, 0)
            d_logits = weights * (_dot(v, d_out, 1) - delta[None, :]) * slope
            return d_k + _dot(d_logits.astype(k.dtype), q, 0), d_v

        return _walk(x, at, g, step, carry)

    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    if at.group == 1:
        d_k, d_v = head(0, (d_k, d_v))
    else:
        d_k, d_v = jax.lax.fori_loop(0, at.group, head, (d_k, d_v))
    d_k_ref[...] = (d_k * _scale(x, at)).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _walk(x: _Inputs, at: _Static, g: Any, step: Callable[..., Any], carry: Any) -> Any:
    """Calls `step(block, masked, carry)` for the inner blocks, first for the whole ones."""
    head = g if x.count.shape[0] > 1 else 0
    whole, masked = x.count[head, 0], x.count[head, 1]
    for cut, start, end in ((False, 0, whole), (True, whole, whole + masked)):
        if at.kinds[cut]:
            carry = jax.lax.fori_loop(
                start, end, lambda n, carry, cut=cut: step(x.order[head, n], cut, carry), carry
            )
    return carry


def _logits(
    x: _Inputs, at: _Static, products: Array, row: Any, column: Any, g: Any, masked: bool
) -> tuple[Array, float, Any]:
    """Makes logits of the products of the outer block `row` and the inner block `column`.

    Returns:
        Logits, -inf where the mask hides the key; the positive number whose product with them has
        the exponentials as its powers of two; and the derivative of the soft-cap.
    """
    starts = (row * at.sizes.outer, column * at.sizes.inner)
    (i, query_block), (j, key_block) = list(zip(starts, at.sizes))[:: -1 if at.by_key else 1]

    def tile(ref: Any) -> Array:
        rows = pl.ds(i, query_block) if ref.shape[1] > 1 else pl.ds(0, 1)
        columns = pl.ds(j, key_block) if ref.shape[2] > 1 else pl.ds(0, 1)
        found = ref[g if ref.shape[0] > 1 else 0, rows, columns]
        return found.T if at.by_key else found

    unit, slope = _LOG2E, 1.0
    if at.softcap is None and x.bias is None and at.scale is not None and at.scale > 0:
        unit = at.scale * _LOG2E  # one multiplication fewer
    else:
        products = products * _scale(x, at)
    if at.softcap is not None:
        bounded = jnp.tanh(products / at.softcap)
        products, slope = bounded * at.softcap, 1 - bounded * bounded
    if x.bias is not None:
        products = products + tile(x.bias).astype(jnp.float32)
    if masked:
        queries = i + _positions(query_block, int(at.by_key))
        keys = j + _positions(key_block, int(not at.by_key))
        allowed = keys < at.key_length
        if x.mask is not None:
            tiles = x.mask.map(lambda axes, ref: tile(ref) != 0 if axes == "BNTS" else tile(ref))
            allowed = allowed & tiles.tile(queries, keys)
        products = jnp.where(jnp.broadcast_to(allowed, products.shape), products, -jnp.inf)
    return products, unit, slope


def _positions(size: int, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)


def _scale(x: _Inputs, at: _Static) -> Any:
    return x.scale[0] if at.scale is None else at.scale


def _dot(a: Array, b: Array, contracted: int) -> Array:
    """Sums over the last axis of `a` and this one of `b`."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision, jnp.float32)


def _exp2(x: Array, interpret: bool) -> Array:
    """Raises two to powers by one instruction, for which subnormal results are zero."""
    if interpret:
        return jnp.exp2(x)
    assert triton is not None
    (y,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[_like(x)],
    )
    return y


# What surrounds them.


def default_sizes(q: Any, v: Any, backward: bool = False) -> BlockSizes:
    """Blocks that spill no registers on sm_80 and sm_90 and fit 99 KiB of shared memory."""
    width = max(_power(q.shape[3]), _power(v.shape[3]))
    if q.dtype == jnp.float32:
        if width > 128:
            return BlockSizes(16, 16) if backward else BlockSizes(32, 16)
        return BlockSizes(32, 32) if backward else BlockSizes(64, 32)
    if width > 128:
        return BlockSizes(32, 32) if backward else BlockSizes(64, 32)
    if width > 64:
        return BlockSizes(64, 64) if backward else BlockSizes(128, 64)
    return BlockSizes(128, 64) if backward else BlockSizes(128, 64, warps=4)


def _prepared(
    given: _Inputs,
    sizes: BlockSizes,
    softcap: float | None,
    interpret: bool,
    by_key: bool = False,
) -> tuple[_Inputs, _Static]:
    """Pads everything to whole blocks and lists the blocks of each program."""
    length, key_length = given.q.shape[1], given.k.shape[1]
    owned, walked = (key_length, length) if by_key else (length, key_length)
    outer, inner = min(sizes.outer, _power(owned)), min(sizes.inner, _power(walked))
    query_block, key_block = (inner, outer) if by_key else (outer, inner)
    kind = blocks.kinds(given.mask, length, key_length, query_block, key_block)
    order, count = blocks.listed(kind.swapaxes(2, 3) if by_key else kind)
    static = isinstance(kind, np.ndarray)
    at = _Static(
        sizes=sizes._replace(outer=outer, inner=inner),
        by_key=by_key,
        group=given.q.shape[2] // given.k.shape[2] if by_key else 1,
        key_length=key_length,
        scale=given.scale if isinstance(given.scale, float) else None,
        softcap=softcap,
        kinds=(
            not static or bool((kind == blocks.WHOLE).any()),
            not static or bool((kind == blocks.MASKED).any()),
        ),
        interpret=interpret,
    )

    def padded(axes: str, x: Any, value: float = 0) -> Any:
        if x is None:
            return None
        to = {"T": query_block, "S": key_block, "H": _power(x.shape[-1])}
        widths = [(0, -size % to.get(axis, 1)) for axis, size in zip(axes, x.shape)]
        return jnp.pad(x, widths, constant_values=value)

    def leaf(x: Array) -> Any:
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        x = x.astype(jnp.int8) if x.dtype == bool else x
        return padded("".join(a if size > 1 else "1" for a, size in zip("BNTS", x.shape)), x)

    mask = None if given.mask is None else given.mask.canonical(length, key_length)
    return given._replace(
        q=padded("BTNH", given.q),
        k=padded("BSKH", given.k),
        v=padded("BSKH", given.v),
        mask=jax.tree.map(leaf, mask),
        bias=None if given.bias is None else leaf(given.bias),
        scale=None if at.scale is not None else jnp.asarray(given.scale, jnp.float32).reshape(1),
        d_out=padded("BTNH", given.d_out),
        lse=padded("BNT", given.lse, jnp.inf),
        delta=padded("BNT", given.delta),
        order=jnp.asarray(order),
        count=jnp.asarray(count),
    ), at


def _call(
    kernel: Callable[..., None],
    x: _Inputs,
    at: _Static,
    outputs: Sequence[tuple[str, jax.ShapeDtypeStruct]],
) -> Sequence[Array]:
    """Runs a kernel for each outer block, head (of keys if it owns keys) and row of the batch.

    Args:
        kernel: Takes the references to the inputs, those to the outputs, and what it knows.
        x: Inputs, padded.
        at: What the kernel knows.
        outputs: Axes, and shape and dtype, of each output.
    """
    assert triton is not None
    owned = "S" if at.by_key else "T"
    share = x.q.shape[2] // x.k.shape[2]
    block = {"B": None, "N": at.group, "K": None, "R": None, owned: at.sizes.outer}

    def spec(axes: str, y: Any) -> pl.BlockSpec:
        """The part of an array that a program sees: an axis that is not divided stays whole."""
        sizes = dict(zip(axes, y.shape))

        def place(r: Any, h: Any, b: Any) -> tuple[Any, ...]:
            key_head = h if at.by_key else jax.lax.div(h, share)
            program = {"B": b, "N": h, "K": key_head, "R": r, owned: r}
            return tuple(program.get(axis, 0) if n > 1 else 0 for axis, n in sizes.items())

        shape = (1 if axis == "N" and n == 1 else block.get(axis, n) for axis, n in sizes.items())
        return pl.BlockSpec(tuple(shape), place)

    def body(*refs: Any) -> None:
        kernel(jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :], at)

    leaves, tree = jax.tree.flatten(x)
    heads = x.k.shape[2] if at.by_key else x.q.shape[2]
    return pl.pallas_call(
        body,
        grid=(x.order.shape[2], heads, x.q.shape[0]),
        in_specs=[spec(axes, y) for axes, field in zip(_AXES, x) for y in jax.tree.leaves(field)],
        out_specs=[spec(axes, y) for axes, y in outputs],
        out_shape=[y for _, y in outputs],
        compiler_params=triton.CompilerParams(num_warps=at.sizes.warps, num_stages=at.sizes.stages),
        interpret=at.interpret,
        name=kernel.__name__.strip("_"),
    )(*leaves)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _power(size: int) -> int:
    """The least power of two from 16 that is not less: Triton multiplies no other sizes."""
    return max(16, 1 << (size - 1).bit_length())
