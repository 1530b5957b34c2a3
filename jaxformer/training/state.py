"""Everything that a training run carries from one step to the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxformer.typing import Array, Int, Key, PyTree


class TrainState(NamedTuple):
    """A tree that `jit`, `pmap` and a checkpoint take as it is.

    In place of the arrays it may hold what describes them, such as shapes or shardings.

    Attributes:
        step: Steps done.
        params: The model's parameters, in float32.
        opt_state: The optimizer's.
        key: Where the randomness of every step is folded from; never changes.
        ema: Moving average of the parameters, or None.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    ema: PyTree | None

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        key: Key[Array, ""],
        *,
        ema: bool = False,
    ) -> "TrainState":
        """Starts a run: step 0, a fresh optimizer, and the average at the parameters if `ema`."""
        average = jax.tree.map(jnp.copy, params) if ema else None
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, average)

    @property
    def best_params(self) -> PyTree:
        """The parameters to evaluate and sample with: the average if there is one."""
        return self.params if self.ema is None else self.ema
