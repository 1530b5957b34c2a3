"""The Hopper kernels of attention's gradient: one for keys and values, one for queries.

Both recompute the weights from the logarithms of their sums. Groups and barriers are as in the
forward kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention._flash_gpu import Form, Inputs
from jaxformer.ops.attention._flash_gpu_forward import (
    COMPUTE_REGISTERS,
    LN2,
    MEMORY_REGISTERS,
    Grid,
    allowed,
    biased,
    capped,
    drain,
    launch,
    load_as,
    matrix,
    multiply,
    rectangle,
    row_of,
    spread,
    stretched,
    wait_if_used,
    zeros,
)
from jaxformer.typing import Array

_FAR_DOWN = -(2.0**120)  # even times the least scale 2**20 below any logit


def keys_and_values(form: Form, inputs: Inputs, targets: tuple[str, ...]) -> list[Array]:
    """Differentiates towards those of "k" and "v" that are in `targets`; rows are keys.

    The queries of all the heads that share a key head pass by, so that their sum stays in
    registers.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    (batch, _, num_heads, _), (_, length, num_kv_heads, _) = q.shape, k.shape
    rows, columns, stages, parts = form.tile
    group, width = num_heads // num_kv_heads, columns // parts
    shape = (rows, width)

    def body(refs: Inputs, outs: Any, shared: Any, b: Any, kv: Any, tile: Any) -> None:
        member = lax.axis_index("member")

        def for_each_head(f: Any, state: Any) -> Any:
            def one(g: Any, state: Any) -> Any:
                n = kv * group + g
                return f(n, (*row_of(refs.lists, b, n), tile), state)

            return one(0, state) if group == 1 else lax.fori_loop(0, group, one, state)

        @pl.when(member == 2)
        def load() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def load_head(n: Any, at: Any, before: Any) -> Any:
                steps = refs.counts[*at, 1]

                @pl.loop(0, steps)
                def _(step: Any) -> None:
                    span = pl.ds(refs.lists[*at, step] * columns, columns)
                    slot = lax.rem(before + step, stages)
                    wait_if_used(before + step, stages, shared["free"])
                    # The generic proxy has read lse and delta: before TMA, the other, overwrites.
                    plgpu.commit_smem()
                    for source, target in (
                        (refs.q.at[b, span, n], shared["q"].at[slot]),
                        (refs.lse.at[b, n, span], shared["lse"].at[slot]),
                        (refs.d_out.at[b, span, n], shared["d_out"].at[slot]),
                        (refs.delta.at[b, n, span], shared["delta"].at[slot, 0]),
                        (refs.delta.at[b, n, span], shared["delta"].at[slot, 1]),
                    ):
                        plgpu.copy_gmem_to_smem(source, target, shared["ready"].at[slot])

                return before + steps

            drain(for_each_head(load_head, jnp.int32(0)), stages, shared["free"])

        @pl.when(member < 2)
        def compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first = tile * (2 * rows) + member * rows
            mine = (b, pl.ds(first, rows), kv)
            scale = refs.scale[0]
            for x in "kv":
                ready = shared["mine_ready"].at[member]
                plgpu.copy_gmem_to_smem(getattr(refs, x).at[mine], shared[x].at[member], ready)
            sums = tuple(zeros((rows, getattr(inputs, x).shape[3])) for x in targets)
            plgpu.barrier_wait(shared["mine_ready"].at[member])

            def visit(step: Any, sums: Any, n: Any, at: Any, before: Any, masked: bool) -> Any:
                slot = _slot(before + step, stages)
                needed = masked or refs.bias is not None
                column = refs.lists[*at, step] * columns if needed else 0
                for part in range(parts):
                    place = (shape, (b, n), (first, column + part * width))
                    sums = visit_part(step, slot, part, place, masked, sums)
                plgpu.barrier_arrive(shared["free"].at[slot])
                return sums

            def visit_part(
                step: Any, slot: Any, part: int, place: Any, masked: bool, sums: Any
            ) -> Any:
                own = {"k": _again(member, step, part), "v": _again(member, step)}
                keys, values = (shared[x].at[i] for x, i in own.items())
                here = pl.ds(part * width, width)
                queries, d_out = (shared[x].at[slot, here] for x in ("q", "d_out"))

                def products() -> tuple[Any, Any]:
                    if part == 0:
                        plgpu.barrier_wait(shared["ready"].at[slot])
                    return keys, queries.transpose((1, 0))

                def slopes() -> tuple[Any, Any, Any]:
                    # Sums take registers of their own: loaded twice, delta need not be copied.
                    deltas = (
                        stretched(shared["delta"].at[slot, i, here], shape, 1) for i in (0, 1)
                    )
                    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    return jnp.where(row & 8 == 0, *deltas), values, d_out.transpose((1, 0))

                weights, slope = _differentiated(
                    form,
                    refs,
                    scale,
                    place,
                    masked,
                    products,
                    lambda: stretched(shared["lse"].at[slot, here], shape, 1),
                    slopes if "k" in targets else None,
                )
                factors = {"k": (slope, queries), "v": (weights, d_out)}
                return tuple(multiply(*((x, *factors[name]) for x, name in zip(sums, targets))))

            def visit_head(n: Any, at: Any, state: Any) -> Any:
                before, sums = state
                whole, steps = refs.counts[*at, 0], refs.counts[*at, 1]

                def some(masked: bool) -> Any:
                    return lambda step, sums: visit(step, sums, n, at, before, masked)

                sums = lax.fori_loop(0, whole, some(False), sums)
                return before + steps, lax.fori_loop(whole, steps, some(True), sums)

            _, sums = for_each_head(visit_head, (jnp.int32(0), sums))
            for x, name, out in zip(sums, targets, outs):
                x = x * (scale * LN2) if name == "k" else x
                shared[name].at[member][...] = x.astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(shared[name].at[member], out.at[mine])
            plgpu.wait_smem_to_gmem(0)

    shared = {
        "k": matrix(q.dtype, 2, rows, k.shape[3]),
        "v": matrix(q.dtype, 2, rows, v.shape[3]),
        "q": matrix(q.dtype, stages, columns, k.shape[3]),
        "d_out": matrix(q.dtype, stages, columns, v.shape[3]),
        "lse": plgpu.SMEM((stages, columns), jnp.float32),
        "delta": plgpu.SMEM((stages, 2, columns), jnp.float32),
        "mine_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "ready": plgpu.Barrier(num_arrivals=5, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    arrays = (getattr(inputs, name) for name in targets)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in arrays)
    size = 2 * group * q.shape[1] * (k.shape[3] + v.shape[3])
    grid = Grid(batch, num_kv_heads, length // (2 * rows), size)
    return list(launch("flash_backward_" + "".join(targets), body, inputs, outs, shared, grid))


def queries(form: Form, inputs: Inputs) -> Array:
    """Differentiates towards the queries."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, num_heads, head_dim = q.shape
    rows, columns, stages, _ = form.tile
    num_tiles, group = length // (2 * rows), num_heads // k.shape[2]

    def body(refs: Inputs, outs: Any, shared: Any, b: Any, n: Any, tile: Any) -> None:
        tile = num_tiles - 1 - tile  # the longest lists of a causal mask first
        member = lax.axis_index("member")
        at = (*row_of(refs.lists, b, n), tile)
        steps = refs.counts[*at, 1]

        @pl.when(member == 2)
        def load() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                slot = lax.rem(step, stages)
                source = (b, pl.ds(refs.lists[*at, step] * columns, columns), lax.div(n, group))
                wait_if_used(step, stages, shared["free"])
                for x in "kv":
                    ready = shared["ready"].at[slot]
                    plgpu.copy_gmem_to_smem(getattr(refs, x).at[source], shared[x].at[slot], ready)

            drain(steps, stages, shared["free"])

        @pl.when(member < 2)
        def compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first = tile * (2 * rows) + member * rows
            mine, mine_ready = (b, pl.ds(first, rows), n), shared["mine_ready"].at[member]
            own, d_out = shared["q"].at[member], shared["d_out"].at[member]
            plgpu.copy_gmem_to_smem(refs.q.at[mine], own, mine_ready)
            plgpu.copy_gmem_to_smem(refs.d_out.at[mine], d_out, mine_ready)
            scale, shape = refs.scale[0], (rows, columns)
            lse, delta = (
                load_as(
                    ref.at[b, n, pl.ds(first, rows)],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                    optimized=False,
                )
                for ref in (refs.lse, refs.delta)
            )
            plgpu.barrier_wait(mine_ready)

            def visit(step: Any, total: Any, masked: bool) -> Any:
                slot, again = _slot(step, stages), _again(member, step)
                needed = masked or refs.bias is not None
                start = (first, refs.lists[*at, step] * columns) if needed else None
                keys, values = shared["k"].at[slot], shared["v"].at[slot]

                def products() -> tuple[Any, Any]:
                    plgpu.barrier_wait(shared["ready"].at[slot])
                    return shared["q"].at[again], keys.transpose((1, 0))

                _, slope = _differentiated(
                    form,
                    refs,
                    scale,
                    (shape, (b, n), start),
                    masked,
                    products,
                    lambda: spread(lse, shape),
                    lambda: (
                        spread(delta, shape),
                        shared["d_out"].at[again],
                        values.transpose((1, 0)),
                    ),
                )
                (total,) = multiply((total, slope, keys))
                plgpu.barrier_arrive(shared["free"].at[slot])
                return total

            whole, total = refs.counts[*at, 0], zeros((rows, head_dim))
            total = lax.fori_loop(0, whole, lambda s, x: visit(s, x, False), total)
            total = lax.fori_loop(whole, steps, lambda s, x: visit(s, x, True), total)
            own[...] = (total * (scale * LN2)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, outs[0].at[mine])
            plgpu.wait_smem_to_gmem(0)

    shared = {
        "q": matrix(q.dtype, 2, rows, head_dim),
        "d_out": matrix(q.dtype, 2, rows, v.shape[3]),
        "k": matrix(q.dtype, stages, columns, head_dim),
        "v": matrix(q.dtype, stages, columns, v.shape[3]),
        "mine_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    outs = (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    size = 2 * k.shape[1] * (head_dim + v.shape[3]) // group
    grid = Grid(batch, num_heads, num_tiles, size)
    return launch("flash_backward_q", body, inputs, outs, shared, grid)[0]


def _differentiated(
    form: Form,
    refs: Inputs,
    scale: Any,
    place: tuple[Any, Any, Any],
    masked: bool,
    logits: Callable[[], tuple[Any, Any]],
    lse: Callable[[], Any],
    slopes: Callable[[], tuple[Any, Any, Any]] | None,
) -> tuple[Any, Any]:
    """The weights of a tile, and the slopes of its logits if `slopes` is given.

    Args:
        form: Of the kernel.
        refs: Its arrays.
        scale: Of the logits, in units of log 2.
        place: Shape of the tile, whose it is, and where it starts.
        masked: Whether the mask cuts it.
        logits: Waits for their factors.
        lse: Loads the logarithms of the sums.
        slopes: Loads what slopes of the weights start from, and their factors.
    """
    dtype, (shape, owner, start) = refs.q.dtype, place
    seen = allowed(form, refs, *place) if masked and form.softcap is None else None
    if form.softcap is None:
        # The products start from the bias, and where it is hidden so far down that they do not lift
        # it: what is known before them takes no registers beside them.
        initial = None if refs.bias is None else rectangle(refs.bias, shape, owner, start)
        if seen is not None:
            initial = jnp.where(seen, 0.0 if initial is None else initial, _FAR_DOWN)
        factors, sums = logits(), lse()
        x, *found = multiply((initial, *factors), *(() if slopes is None else (slopes(),)))
        weights = jnp.exp2(x * scale - sums)
        return weights.astype(dtype), (weights * found[0]).astype(dtype) if found else None

    # A soft-cap would lift them, and needs so many registers that the products are made in turn.
    (x,) = multiply((None, *logits()))
    x, _ = capped(form, x, scale)
    tanh = x * (LN2 / form.softcap)
    x, _ = biased(refs, x, None, owner, start)
    x = x - lse()
    seen = allowed(form, refs, *place) if masked else None
    weights = jnp.exp2(x if seen is None else jnp.where(seen, x, -jnp.inf))
    if slopes is None:
        return weights.astype(dtype), None
    narrow, weights = lax.optimization_barrier(
        (weights.astype(dtype), weights * (1.0 - tanh * tanh))
    )
    (found,) = multiply(slopes())
    return narrow, (weights * found).astype(dtype)


def _again(index: Any, step: Any, part: int = 0) -> Any:
    """The index, in a form of which compilers do not see that it never changes.

    They would work out the addresses of all products before the loop, for want of registers to
    spill them.
    """
    return index + lax.shift_right_logical(step, 30 - part)


def _slot(step: Any, stages: int) -> Any:
    return lax.rem(step, stages) if stages > 1 else _again(0, step)
