"""The Hopper kernel of attention, forward; what its backward shares stands at the end.

A block of threads is three groups of 128. The third moves keys and values from memory, by TMA; the
first two own `rows` queries each and do the rest. What holds between them:

* A slot of shared memory is written after both have arrived at its `free` barrier, and read after
  its `ready` barrier, at which TMA arrives with the last byte. wgmma reads by the asynchronous
  proxy, as TMA writes, so that no fence stands between the two.
* A group arrives at `free` once it has waited for the products that read the slot.
* While the logits of a step become weights, those of the step before still meet their values. Two
  groups that run freely fall out of step by themselves, and one multiplies while the other
  exponentiates; to have them take turns was no faster.
* Whoever waits on a barrier waits for all of its phases, which the interpreter checks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxformer.ops.attention._flash_gpu import Form, Inputs
from jaxformer.typing import Array

load_as: Any = plgpu.load  # jax before 0.11 wants another argument
LN2 = 0.6931471805599453
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24  # of 168 each that a thread starts with
PROCESSORS, CACHE = 132, 24 << 20  # of an H100 or H200; half of the bytes of its second level


def attend(form: Form, inputs: Inputs) -> tuple[Array, Array]:
    """Returns the result, B T N Hv, and the logarithms of the sums, B N T."""
    q, k, v = inputs.q, inputs.k, inputs.v
    (batch, length, num_heads, head_dim), value_dim = q.shape, v.shape[3]
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

            def load_one(x: str, step: Any) -> None:
                slot = lax.rem(step, stages)
                source = (b, pl.ds(refs.lists[*at, step] * columns, columns), lax.div(n, group))
                wait_if_used(step, stages, shared[x + "_free"])
                ready = shared[x + "_ready"].at[slot]
                plgpu.copy_gmem_to_smem(getattr(refs, x).at[source], shared[x].at[slot], ready)

            load_one("k", jnp.int32(0))

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                pl.when(step + 1 < steps)(lambda: load_one("k", step + 1))
                load_one("v", step)

            drain(steps, stages, shared["k_free"], shared["v_free"])

        @pl.when(member < 2)
        def compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first = tile * (2 * rows) + member * rows
            mine = (b, pl.ds(first, rows), n)
            queries = shared["q"].at[member]
            plgpu.copy_gmem_to_smem(refs.q.at[mine], queries, shared["q_ready"].at[member])
            scale = refs.scale[0]
            largest = -jnp.inf if refs.sinks is None else refs.sinks[n]
            total = 0.0 if refs.sinks is None else 1.0
            largest, total = (
                plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                for x in (largest, total)
            )
            plgpu.barrier_wait(shared["q_ready"].at[member])

            def used(x: str, step: Any) -> None:
                plgpu.barrier_arrive(shared[x + "_free"].at[lax.rem(step, stages)])

            def wait_for(x: str, step: Any) -> Any:
                """Keys or values of a step, once they are there."""
                plgpu.barrier_wait(shared[x + "_ready"].at[lax.rem(step, stages)])
                return shared[x].at[lax.rem(step, stages)]

            def softmax(step: Any, logits: Any, largest: Any, total: Any, masked: bool) -> Any:
                """Weights; largest and total after them; by how much those before shrink."""
                used("k", step)
                needed = masked or refs.bias is not None
                start = (first, refs.lists[*at, step] * columns) if needed else None
                x, unit = capped(form, logits, scale)
                x, unit = biased(refs, x, unit, (b, n), start)
                seen = allowed(form, refs, x.shape, (b, n), start) if masked else None
                if seen is not None:
                    x = jnp.where(seen, x, -jnp.inf)
                new = jnp.maximum(largest, scaled(x.max(axis=1), unit))
                # Nothing seen yet: -inf - 0 is as small as -inf - -inf ought to be.
                shift = jnp.where(new == -jnp.inf, 0.0, new) if needed else new
                weights = jnp.exp2(scaled(x, unit) - spread(shift, x.shape))
                shrink = jnp.exp2(largest - shift)
                total = total * shrink + weights.sum(axis=1)
                found = lax.optimization_barrier((weights, new, total, shrink))
                # A loop, past which ptxas lets nothing sink: it would else let all of this sink
                # past the wait for the products that run meanwhile.
                wait_for("v", step)
                return found

            def visit(step: Any, state: Any, masked: bool) -> Any:
                """Multiplies by the values of the step before, and meanwhile takes the softmax."""
                out, weights, largest, total = state
                keys, values = wait_for("k", step), shared["v"].at[lax.rem(step - 1, stages)]
                _, out, weights, largest, total, shrink = multiply(
                    (None, queries, keys.transpose((1, 0))),
                    (out, weights, values),
                    early=lambda logits: softmax(step, logits, largest, total, masked),
                    room=(zeros((rows, columns)), largest, total, total),
                )
                used("v", step - 1)
                # Not narrowed earlier, since the product reads the registers of those before.
                out = out * spread(shrink, out.shape)
                return out, weights.astype(v.dtype), largest, total

            keys = wait_for("k", 0).transpose((1, 0))
            (logits,) = multiply((None, queries, keys))
            weights, largest, total, _ = softmax(jnp.int32(0), logits, largest, total, True)
            state = (zeros((rows, value_dim)), weights.astype(v.dtype), largest, total)
            whole = jnp.clip(refs.counts[*at, 0], 1, steps)
            state = lax.fori_loop(1, whole, lambda s, x: visit(s, x, False), state)
            state = lax.fori_loop(whole, steps, lambda s, x: visit(s, x, True), state)
            out, weights, largest, total = state
            (out,) = multiply((out, weights, shared["v"].at[lax.rem(steps - 1, stages)]))
            used("v", steps - 1)

            nothing = total == 0
            out = out * spread(1.0 / jnp.where(nothing, 1.0, total), out.shape)
            result, sums = shared.get("out", shared["q"]).at[member], shared["lse"].at[member]
            result[...] = out.astype(q.dtype)
            sums[...] = jnp.where(nothing, -jnp.inf, (largest + jnp.log2(total)) * LN2)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, outs[0].at[mine])
            plgpu.copy_smem_to_gmem(sums, outs[1].at[b, n, pl.ds(first, rows)])
            plgpu.wait_smem_to_gmem(0)

    shared = {
        "q": matrix(q.dtype, 2, rows, head_dim),
        "k": matrix(q.dtype, stages, columns, head_dim),
        "v": matrix(q.dtype, stages, columns, value_dim),
        "lse": plgpu.SMEM((2, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=2),
    }
    for x in "kv":
        shared[x + "_ready"] = plgpu.Barrier(num_barriers=stages)
        shared[x + "_free"] = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    if value_dim != head_dim:
        shared["out"] = matrix(q.dtype, 2, rows, value_dim)
    types_of_outs = (
        jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
    )
    size = 2 * k.shape[1] * (head_dim + value_dim) // group
    grid = Grid(batch, num_heads, num_tiles, size)
    return launch("flash_forward", body, inputs, types_of_outs, shared, grid)


class Grid(NamedTuple):
    """Of a kernel: for each row of the batch and each head some tiles, which read `size` bytes."""

    batch: int
    heads: int
    tiles: int
    size: int

    def together(self) -> int:
        """How many heads are worked on at a time: as many as the cache holds, or as there is room.

        Within them the longest tiles come first, so that short ones fill the gaps at the end.
        """
        total = self.batch * self.heads
        numbers = [n for n in range(1, total + 1) if total % n == 0]
        fit = [n for n in numbers if n * self.size <= CACHE]
        enough = [n for n in numbers if n * self.tiles >= PROCESSORS]
        return max(max(fit, default=1), min(enough, default=total))


def launch(name: str, body: Any, inputs: Inputs, out_type: Any, shared: Any, grid: Grid) -> Any:
    """Runs `body(inputs, results, shared memory, row of the batch, head, tile)` on three groups."""
    arrays, tree = jax.tree.flatten(inputs)
    together = grid.together()

    def entry(*refs: Any, **scratch: Any) -> None:
        rest, one = jnp.divmod(lax.axis_index("program"), together)
        several, tile = jnp.divmod(rest, grid.tiles)
        b, n = jnp.divmod(several * together + one, grid.heads)
        body(tree.unflatten(refs[: len(arrays)]), refs[len(arrays) :], scratch, b, n, tile)

    return plgpu.kernel(
        entry,
        out_type=out_type,
        scratch_types=shared,
        grid=(grid.batch * grid.heads * grid.tiles,),
        grid_names=("program",),
        num_threads=3,
        thread_name="member",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)


def matrix(dtype: Any, *shape: int) -> Any:
    """Shared memory as TMA writes and wgmma reads it, swizzled in rows of 128 bytes."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def wait_if_used(step: Any, stages: int, free: Any) -> None:
    """Waits until what a slot held before is read."""
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[lax.rem(step, stages)]))


def drain(steps: Any, stages: int, *free: Any) -> None:
    """Waits until the last steps are read."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step: Any) -> None:
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(step, stages)])


def multiply(
    *products: Any,
    early: Callable[[Any], Any] = lambda _: (),
    room: Sequence[Any] = (),
) -> list[Any]:
    """Adds `a @ b` to `x` for each (x, a, b), x None being zeros.

    Args:
        products: What to multiply.
        early: Called with the first sum once it is there, while the others are on their way; what
            it returns follows the sums.
        room: Arrays of the shapes that it returns.
    """
    if interpreted():  # its own wgmma reads no registers and sees no races
        read = [(a if isinstance(a, jax.Array) else a[...], b[...]) for _, a, b in products]
        plgpu.commit_smem()  # the reads are of the asynchronous proxy
        fresh = [jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in read]
        sums = [y if x is None else x + y for y, (x, _, _) in zip(fresh, products)]
        return [*sums, *early(sums[0])]

    def start(refs: Any) -> None:
        for x, (_, a, b) in zip(refs, products):
            plgpu.wgmma(x, a, b)
        if room:
            first = plgpu.wgmma_accumulator_load(refs[0], wait_n=len(products) - 1)
            for ref, x in zip(refs[len(products) :], early(first), strict=True):
                ref[...] = x

    def fresh_sum(x: Any) -> Any:
        start([x])
        return x[...]

    shapes = [(a.shape[0], b.shape[1]) for _, a, b in products]
    if len(products) == 1 and products[0][0] is None:
        return [pl.run_scoped(fresh_sum, plgpu.WGMMAAccumulatorRef(shapes[0]))]
    sums = [zeros(shape) if x is None else x for shape, (x, _, _) in zip(shapes, products)]
    return pl.run_state(start)([*map(plgpu.WGMMAAccumulatorRef.init, sums), *room])


def interpreted() -> bool:
    """Whether jax's interpreter of kernels is at work."""
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def capped(form: Form, logits: Any, scale: Any) -> tuple[Any, Any]:
    """Logits after the soft-cap, in units of `unit` log 2; None is 1."""
    if form.softcap is None:
        return logits, scale
    # tanh(x) is 1 - 2 / (exp(2x) + 1), to a few units in the last place; tanh.approx has 11 bits.
    power, cap = jnp.exp2(logits * (scale * (2 / form.softcap))), form.softcap / LN2
    return cap - (2 * cap) / (power + 1.0), None


def biased(refs: Inputs, x: Any, unit: Any, owner: Any, start: Any) -> tuple[Any, Any]:
    """Logits with the bias, if there is one."""
    if refs.bias is None:
        return x, unit
    return scaled(x, unit) + rectangle(refs.bias, x.shape, owner, start), None


def scaled(x: Any, unit: Any) -> Any:
    return x if unit is None else x * unit


def allowed(form: Form, refs: Inputs, shape: Any, owner: Any, start: Any) -> Any:
    """Draws the mask where the tile starts; None if all of it may look."""

    def positions(axis: int) -> Any:
        # Loaded, since an iota of the columns would be hoisted from the loop and fill registers.
        where = pl.ds(start[axis], shape[axis])
        return stretched(refs.positions.at[0, 0, 0, where], shape, axis)

    i, j = form.query_axis, 1 - form.query_axis
    seen = None
    if form.mask is not None:
        tree, boolean = form.mask
        leaves = [rectangle(ref, shape, owner, start) for ref in refs.leaves]
        leaves = [x != 0 if is_bool else x for x, is_bool in zip(leaves, boolean)]
        seen = jax.tree.unflatten(tree, leaves).tile(positions(i), positions(j))
        seen = jnp.broadcast_to(seen, shape)
    if form.ragged:
        exists = positions(j) < form.key_length
        seen = exists if seen is None else seen & exists
    return seen


def rectangle(ref: Any, shape: Any, owner: Any, start: Any) -> Any:
    """Loads the part of B N (rows) (columns) that belongs to a tile; axes of size 1 spread."""
    axes = [axis for axis in (0, 1) if ref.shape[2 + axis] > 1]
    where = [pl.ds(start[axis], shape[axis]) if axis in axes else 0 for axis in (0, 1)]
    where = (*row_of(ref, *owner), *where)
    if not axes:
        return jnp.broadcast_to(ref[where], shape)
    if len(axes) == 1:
        return stretched(ref.at[where], shape, axes[0])
    return load_as(ref.at[where], layout=plgpu.Layout.WGMMA, optimized=False)


def stretched(ref: Any, shape: Any, axis: int) -> Any:
    """Loads what runs along one axis of a tile, and spreads it over the other."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return lax.broadcast_in_dim(load_as(ref, layout=layout, optimized=False), shape, [axis])


def spread(x: Any, shape: Any) -> Any:
    """Spreads a value for each row over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def row_of(ref: Any, b: Any, n: Any) -> tuple[Any, Any]:
    """Where #B #N hold row b and head n."""
    return (b if ref.shape[0] > 1 else 0), (n if ref.shape[1] > 1 else 0)


def zeros(shape: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA)
