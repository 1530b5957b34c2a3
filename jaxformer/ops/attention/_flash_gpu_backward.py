"""The Hopper kernels of attention's gradient: one for keys and values, one for queries.

Both recompute the weights from the logarithms of their sums. Groups and barriers are as in the
forward kernel, without turns: two groups that run freely fall out of step by themselves, and each
multiplies for most of the time.
"""

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
    allowed,
    biased,
    capped,
    drain,
    launch,
    load_as,
    matrix,
    multiply,
    row_of,
    scaled,
    spread,
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
    rows, columns, stages = form.tile
    group = num_heads // num_kv_heads

    def body(refs: Inputs, outs: Any, shared: Any) -> None:
        b, kv, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
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
                    for name, source in (
                        ("q", refs.q.at[b, span, n]),
                        ("lse", refs.lse.at[b, n, span]),
                        ("d_out", refs.d_out.at[b, span, n]),
                        ("delta", refs.delta.at[b, n, span]),
                    ):
                        ready = shared["ready"].at[slot]
                        plgpu.copy_gmem_to_smem(source, shared[name].at[slot], ready)

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
                slot = lax.rem(before + step, stages)
                start, seen, shape = None, None, (rows, columns)
                if masked or refs.bias is not None:
                    start = (first, refs.lists[*at, step] * columns)
                if masked:
                    seen = allowed(form, refs, shape, (b, n), start)
                initial, seen = _hidden(form, seen)
                plgpu.barrier_wait(shared["ready"].at[slot])
                queries, d_out = shared["q"].at[slot], shared["d_out"].at[slot]
                lse, delta = (
                    lax.broadcast_in_dim(
                        load_as(shared[name].at[slot], layout=plgpu.Layout.WGMMA.reduce(0)),
                        shape,
                        [1],
                    )
                    for name in ("lse", "delta")
                )
                products = [(initial, shared["k"].at[member], queries.transpose((1, 0)))]
                if "k" in targets:
                    products.append((delta, shared["v"].at[member], d_out.transpose((1, 0))))
                logits, *slopes = multiply(*products)
                # The generic proxy has read lse and delta: before TMA, the other, may overwrite.
                plgpu.commit_smem()
                owner = (b, n)
                weights, factor = _weights(form, refs, logits, scale, lse, owner, start, seen)
                factors = {"v": (weights, d_out)}
                if "k" in targets:
                    slope = weights * slopes[0]
                    factors["k"] = (slope if factor is None else slope * factor, queries)
                products = [(x, *factors[name]) for x, name in zip(sums, targets)]
                products = [(x, a.astype(q.dtype), b) for x, a, b in products]
                sums = multiply(*products)
                plgpu.barrier_arrive(shared["free"].at[slot])
                return tuple(sums)

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
        "delta": plgpu.SMEM((stages, columns), jnp.float32),
        "mine_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "ready": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    arrays = (getattr(inputs, name) for name in targets)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, q.dtype) for x in arrays)
    grid = (batch, num_kv_heads, length // (2 * rows))
    return list(launch("flash_backward_" + "".join(targets), body, inputs, outs, shared, grid))


def queries(form: Form, inputs: Inputs) -> Array:
    """Differentiates towards the queries."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, num_heads, head_dim = q.shape
    rows, columns, stages = form.tile
    num_tiles, group = length // (2 * rows), num_heads // k.shape[2]

    def body(refs: Inputs, outs: Any, shared: Any) -> None:
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        tile = num_tiles - 1 - lax.axis_index("tile")
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
                slot = lax.rem(step, stages)
                start = seen = None
                if masked or refs.bias is not None:
                    start = (first, refs.lists[*at, step] * columns)
                if masked:
                    seen = allowed(form, refs, shape, (b, n), start)
                initial, seen = _hidden(form, seen)
                plgpu.barrier_wait(shared["ready"].at[slot])
                keys, values = shared["k"].at[slot], shared["v"].at[slot]
                logits, slope = multiply(
                    (initial, own, keys.transpose((1, 0))),
                    (None, d_out, values.transpose((1, 0))),
                )
                owner, sums = (b, n), spread(lse, shape)
                weights, factor = _weights(form, refs, logits, scale, sums, owner, start, seen)
                slope = weights * (slope + spread(delta, shape))
                slope = slope if factor is None else slope * factor
                (total,) = multiply((total, slope.astype(q.dtype), keys))
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
    return launch("flash_backward_q", body, inputs, outs, shared, (batch, num_heads, num_tiles))[0]


def _hidden(form: Form, seen: Any) -> tuple[Any, Any]:
    """What logits start from, and what is then left of the mask.

    Hidden ones start so far down that their product does not lift them: a choice made before the
    products takes no registers beside them. A soft-cap would lift them: there it is made later.
    """
    if seen is None or form.softcap is not None:
        return None, seen
    return jnp.where(seen, 0.0, _FAR_DOWN), None


def _weights(
    form: Form,
    refs: Inputs,
    logits: Any,
    scale: Any,
    lse: Any,
    owner: Any,
    start: Any,
    seen: Any,
) -> tuple[Any, Any]:
    """The weights of a tile, and the slope of the soft-cap or None."""
    x, unit = capped(form, logits, scale)
    tanh = None if form.softcap is None else x * (LN2 / form.softcap)
    x, unit = biased(refs, x, unit, owner, start)
    x = scaled(x, unit) - lse
    if seen is not None:
        x = jnp.where(seen, x, -jnp.inf)
    return jnp.exp2(x), None if tanh is None else 1.0 - tanh * tanh
