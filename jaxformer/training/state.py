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
        extra: What the loss keeps from step to step beside the parameters, such as the centre of a
            teacher's outputs or the counts of a codebook; or None.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    ema: PyTree | None
    extra: PyTree | None = None

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        key: Key[Array, ""],
        *,
        ema: bool = False,
        extra: PyTree | None = None,
    ) -> "TrainState":
        """Starts a run: step 0, a fresh optimizer, and the average at the parameters if `ema`.

        Raises:
            ValueError: If a leaf of `extra` is not of floating-point numbers: it could not be
                averaged over parts of a batch.
        """
        extra = jax.tree.map(jnp.asarray, extra)
        for leaf in jax.tree.leaves(extra):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(f"extra holds floating-point arrays only, got {leaf.dtype}.")
        average = jax.tree.map(jnp.copy, params) if ema else None
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, average, extra)

    @property
    def best_params(self) -> PyTree:
        """The parameters to evaluate and sample with: the average if there is one."""
        return self.params if self.ema is None else self.ema
