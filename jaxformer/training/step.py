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

from jaxformer.training.state import TrainState
from jaxformer.typing import Array, DTypeLike, Key, PyTree

Metrics = dict[str, Array]
Batch = PyTree
LossFn = Callable[[PyTree, Batch, Key[Array, ""]], tuple[Array, Metrics]]
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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    compute_dtype: DTypeLike = jnp.float32,
) -> PureStep:
    """Makes a pure function from a state and a batch to the next state and the step's metrics.

    The key that `loss_fn` is given is folded from the state's key and the step, so a step depends
    on nothing but its arguments. The metrics are those of `loss_fn` with `loss`, `grad_norm` (of
    the whole gradient, before any clipping) and `param_norm` (of the new parameters): where these
    are finite, so is the new state.

    Args:
        loss_fn: Takes parameters, batch and key; returns the mean loss over the batch and a
            dictionary of further scalars that are means as well.
        optimizer: Any optax transformation, such as those of `training.optimizers`.
        accumulate: Parts that the batch is cut into, whose gradients are averaged one after the
            other: the gradient of the whole batch with the memory of a part.
        ema_decay: Share of the old average that stays at each step, (1 + step) / (10 + step) where
            that is less; needs a state created with `ema=True`.
        compute_dtype: What the parameters are cast to for `loss_fn`; the state and the optimizer
            stay in float32.

    Raises:
        ValueError: If `accumulate` is below 1 or `ema_decay` outside [0, 1); when called, if parts
            do not divide the batch, or if only one of state and step has an average.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be positive, got accumulate={accumulate}.")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got ema_decay={ema_decay}.")

    def loss_in_compute_dtype(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        return loss_fn(cast_floats(params, compute_dtype), batch, key)

    grad_fn = jax.value_and_grad(loss_in_compute_dtype, has_aux=True)

    def step(
        state: TrainState, batch: Batch, *, axis: str | None = None
    ) -> tuple[TrainState, Metrics]:
        if (ema_decay is None) != (state.ema is None):
            raise ValueError("ema_decay and a state created with ema=True need each other.")
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis))
        (loss, metrics), grads = _accumulate(grad_fn, state.params, batch, key, accumulate)
        metrics = {**metrics, "loss": loss}
        if axis is not None:
            grads, metrics = lax.pmean((grads, metrics), axis)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["param_norm"] = optax.tree.norm(params)
        ema = None if ema_decay is None else _average(state.ema, params, state.step, ema_decay)
        return TrainState(state.step + 1, params, opt_state, state.key, ema), metrics

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


def _accumulate(
    grad_fn: Callable[..., Any], params: PyTree, batch: Batch, key: Array, parts: int
) -> Any:
    """Averages values and gradients over the parts of a batch, of which one is in memory at a time.

    Part i takes every row whose index is i modulo `parts`: of a batch that is split over devices,
    each then keeps its own rows.
    """
    if parts == 1:
        return grad_fn(params, batch, key)
    for x in jax.tree.leaves(batch):
        if x.shape[0] % parts:
            raise ValueError(f"accumulate={parts} does not divide a batch of B={x.shape[0]}.")
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def one(i: Array) -> Any:
        return grad_fn(params, jax.tree.map(lambda x: x[i], split), jax.random.fold_in(key, i))

    def add(total: Any, i: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(i)), None

    total, _ = lax.scan(add, one(jnp.array(0)), jnp.arange(1, parts))
    return jax.tree.map(lambda x: x / parts, total)


def _average(old: PyTree, new: PyTree, step: Array, decay: float) -> PyTree:
    share = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + share * (new - old), old, new)


def _settled(state: TrainState, sharding: PyTree) -> TrainState:
    """Moves a new state onto its devices; a step from elsewhere would be compiled by itself."""
    if isinstance(state.step.sharding, NamedSharding):
        return state
    return jax.jit(lambda state: state, out_shardings=sharding)(state)


def _require_divisible(x: Any, devices: int) -> None:
    if x.shape[0] % devices:
        raise ValueError(f"a batch of B={x.shape[0]} does not split over data={devices} devices.")
