"""One pure training step, and its two ways onto many devices."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.training import ema, leaves
from jaxformer.training.state import TrainState
from jaxformer.typing import Array, DTypeLike, Key, PyTree

Metrics = dict[str, Array]
Batch = PyTree
LossFn = Callable[[PyTree, Batch, Key[Array, ""]], tuple[Array, Metrics]]
StatefulLossFn = Callable[
    [PyTree, Batch, Key[Array, ""], TrainState], tuple[Array, tuple[Metrics, PyTree | None]]
]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@runtime_checkable
class PureStep(Protocol):
    """What `make_train_step` returns."""

    def __call__(
        self, state: TrainState, batch: Batch, *, axis: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Takes one step; `axis` is the mapped axis that the batch is split over, if any."""
        ...


def make_train_step(
    loss_fn: LossFn | StatefulLossFn,
    optimizer: optax.GradientTransformation,
    *,
    stateful: bool = False,
    accumulate: int = 1,
    ema_decay: float | optax.Schedule | None = None,
    compute_dtype: DTypeLike = jnp.float32,
) -> PureStep:
    """Makes a pure function from a state and a batch to the next state and the step's metrics.

    The key that `loss_fn` is given is folded from the state's key and the step, so a step depends
    on nothing but its arguments. The metrics are those of `loss_fn` with `loss`, `grad_norm` (of
    the whole gradient, before any clipping) and `param_norm` (of the new parameters): where these
    are finite, so is the new state.

    A stateful loss sees the state before the step, of which no gradient is taken: `state.ema` is
    its teacher, `state.step` tells where its schedules stand, and `state.extra` is what it keeps
    beside the parameters, whose next value it returns:

        def loss_fn(params, batch, key, state):
            ...
            return loss, (metrics, extra)

    Parts of a batch, and devices of `pmap_step`, all start from the same `extra`, and what they
    return is averaged. That is the step of the whole batch if the new `extra` depends on the rows
    through means alone, as `m * old + (1 - m) * rows.mean(0)` does; sums are to be means times the
    number of rows that the loss was given.

    Args:
        loss_fn: Takes parameters, batch and key; returns the mean loss over the batch and a
            dictionary of further scalars that are means as well.
        optimizer: Any optax transformation, such as those of `training.optimizers`.
        stateful: Whether `loss_fn` takes the state as well, and returns the metrics in a pair with
            the next `extra` (`state.extra` where it changes nothing).
        accumulate: Parts that the batch is cut into, whose gradients are averaged one after the
            other: the gradient of the whole batch with the memory of a part.
        ema_decay: Share of the old average that stays at each step, as a function of the steps done
            such as `ema.cosine`; a number stands for `ema.ramped`. Needs a state created with
            `ema=True`.
        compute_dtype: What the parameters and their average are cast to for `loss_fn`; the state
            and the optimizer stay in float32.

    Raises:
        ValueError: If `accumulate` is below 1 or `ema_decay` outside [0, 1); when called, if parts
            do not divide the batch, if only one of state and step has an average, if a state with
            `extra` meets a loss that is not stateful, or the loss returns another kind of `extra`.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be positive, got accumulate={accumulate}.")
    decay = ema.ramped(ema_decay) if isinstance(ema_decay, float | int) else ema_decay
    grad_fn = jax.value_and_grad(_lifted(loss_fn, stateful, compute_dtype), has_aux=True)

    def step(
        state: TrainState, batch: Batch, *, axis: str | None = None
    ) -> tuple[TrainState, Metrics]:
        if (decay is None) != (state.ema is None):
            raise ValueError("ema_decay and a state created with ema=True need each other.")
        if state.extra is not None and not stateful:
            raise ValueError("a state with extra needs make_train_step(..., stateful=True).")
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))
        seen = state._replace(ema=cast_floats(state.ema, compute_dtype))
        (loss, (metrics, extra)), grads = _accumulate(
            lambda rows, key: grad_fn(state.params, rows, key, seen), batch, key, accumulate
        )
        _require_same_kind(state.extra, extra)
        metrics = {**metrics, "loss": loss}
        if axis is not None:
            grads, metrics, extra = lax.pmean((grads, metrics, extra), axis)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["param_norm"] = optax.tree.norm(params)
        average = None if decay is None else ema.follow(state.ema, params, decay(state.step))
        return TrainState(state.step + 1, params, opt_state, state.key, average, extra), metrics

    return step


def jitted(step: PureStep, mesh: Mesh, state_sharding: PyTree | None = None) -> jax.stages.Wrapped:
    """What `jit_step` calls, for batches from `place`; or to be lowered and inspected by itself."""
    replicated = NamedSharding(mesh, PartitionSpec())
    sharding = replicated if state_sharding is None else state_sharding
    return jax.jit(
        step,
        in_shardings=(sharding, NamedSharding(mesh, PartitionSpec("data"))),
        out_shardings=(sharding, replicated),
        donate_argnums=0,
    )


def jit_step(step: PureStep, mesh: Mesh, state_sharding: PyTree | None = None) -> Step:
    """Compiles a step for a mesh: the batch is split over its axis `data`, the state follows.

    The old state's memory is given to the new one: keep no reference to it, nor to the parameters
    that it was created with.

    Args:
        step: From `make_train_step`.
        mesh: Devices, with an axis named `data`.
        state_sharding: Sharding of each leaf of the state; everything on every device if None.

    Returns:
        A function of state and batch. The batch may be of NumPy arrays, of which each process
        gives its own rows, or of arrays from `place`, whose errors it raises.
    """
    compiled = jitted(step, mesh, state_sharding)
    sharding = NamedSharding(mesh, PartitionSpec()) if state_sharding is None else state_sharding

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return compiled(_settled(state, sharding), place(batch, mesh))

    return run


def pmap_step(step: PureStep, mesh: Mesh | None = None) -> Step:
    """Compiles a step for many devices with `pmap`: the same numbers as `jit_step`.

    Random numbers inside `loss_fn` differ: each device draws its own. With gradient accumulation
    each device's share of the batch is what is cut into parts. With several processes the new state
    lies on each one's own devices, where orbax does not take it: checkpoints need `jit_step`.

    Args:
        step: From `make_train_step`.
        mesh: Its devices are used, those of all processes; all there are if None.

    Returns:
        A function of state and a batch of NumPy arrays, of which each process gives its own rows.
        It raises ValueError if the devices do not divide the batch.
    """
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    everywhere = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec())
    count = sum(device.process_index == jax.process_index() for device in devices)
    mapped = jax.pmap(
        functools.partial(step, axis="data"),
        "data",
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
    )

    def split(x: Any) -> Any:
        _require_divisible(x, count)
        return x.reshape(count, -1, *x.shape[1:])

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return mapped(_settled(state, everywhere), jax.tree.map(split, batch))

    return run


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a batch on the devices of a mesh, split over its axis `data`.

    Args:
        batch: NumPy arrays, of which each process of the mesh gives its own rows, as many as the
            others. Arrays of JAX stay as they are.
        mesh: Devices, with an axis named `data`.

    Raises:
        ValueError: If the axis does not divide the batch, or processes do not divide the axis.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    processes = len({device.process_index for device in mesh.devices.flat})
    if mesh.shape["data"] % processes:
        raise ValueError(f"data={mesh.shape['data']} does not split over {processes} processes.")

    def put(x: Any) -> Array:
        if isinstance(x, jax.Array):
            return x
        _require_divisible(x, mesh.shape["data"] // processes)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, batch)


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point leaves of a tree and leaves the others alone."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _lifted(loss_fn: Callable[..., Any], stateful: bool, dtype: DTypeLike) -> StatefulLossFn:
    """Makes a stateful loss of any, which casts the parameters."""

    def lifted(params: PyTree, batch: Batch, key: Array, state: TrainState) -> Any:
        params = cast_floats(params, dtype)
        if stateful:
            return loss_fn(params, batch, key, state)
        loss, metrics = loss_fn(params, batch, key)
        return loss, (metrics, None)

    return lifted


def _accumulate(
    grad_fn: Callable[[Batch, Array], Any], batch: Batch, key: Array, parts: int
) -> Any:
    """Averages values and gradients over the parts of a batch, of which one is in memory at a time.

    Part i takes every row whose index is i modulo `parts`: of a batch that is split over devices,
    each then keeps its own rows.
    """
    if parts == 1:
        return grad_fn(batch, key)
    for x in jax.tree.leaves(batch):
        if x.shape[0] % parts:
            raise ValueError(f"accumulate={parts} does not divide a batch of B={x.shape[0]}.")
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def one(i: Array) -> Any:
        return grad_fn(jax.tree.map(lambda x: x[i], split), jax.random.fold_in(key, i))

    def add(total: Any, i: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(i)), None

    total, _ = lax.scan(add, one(jnp.array(0)), jnp.arange(1, parts))
    return jax.tree.map(lambda x: x / parts, total)


def _require_same_kind(old: PyTree, new: PyTree) -> None:
    """Refuses an `extra` that would have the next step compiled anew, or a checkpoint refused."""
    before, after = (jax.tree.map(leaves.kind, tree) for tree in (old, new))
    if before != after:
        raise ValueError(f"the loss was given extra={before} and returned extra={after}.")


def _settled(state: TrainState, sharding: PyTree) -> TrainState:
    """Moves a new state onto its devices; a step from elsewhere would be compiled by itself."""
    if isinstance(state.step.sharding, NamedSharding):
        return state
    return jax.jit(lambda state: state, out_shardings=sharding)(state)


def _require_divisible(x: Any, devices: int) -> None:
    if x.shape[0] % devices:
        raise ValueError(f"a batch of B={x.shape[0]} does not split over data={devices} devices.")
