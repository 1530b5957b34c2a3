"""A tree as the named arrays that a checkpoint stores, and back onto devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.typing import PyTree


def named(tree: PyTree) -> dict[str, Any]:
    """Maps the path of each leaf, joined by dots, to the leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: If a leaf is not an array (or its shape), or two paths read the same.
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "array"
        if name in found:
            raise ValueError(f"Two leaves of the tree have the same path {name!r}.")
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise ValueError(f"The leaf {name!r} is {leaf!r}, not an array.")
        found[name] = leaf
    return found


def kind(leaf: Any) -> str:
    """Names dtype and shape: `float32[3, 5]`, `key<fry>[]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def storable(leaf: Any) -> Any:
    """Turns a typed random key into its uint32 data and a NumPy scalar into an array."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def target(leaf: Any) -> Any:
    """Describes what to read for `leaf`: onto its devices, or to the host if none were chosen."""
    sharding = _chosen_sharding(leaf)
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    if sharding is None:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def filled(leaf: Any, stored: Any) -> Any:
    """Makes an array like `leaf` of what was read for it; None stands for no elements."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.zeros(leaf.shape, leaf.dtype) if stored is None else stored
    if stored is None:
        return jnp.zeros(leaf.shape, leaf.dtype, device=_chosen_sharding(leaf))
    if isinstance(stored, np.ndarray):
        stored = jnp.array(stored)
    return jax.random.wrap_key_data(stored, impl=_impl(leaf)) if _is_key(leaf) else stored


def _chosen_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    # An uncommitted array may join any others in a jitted call; one put on a device may not.
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(key: Any) -> Any:
    found = []
    # A shape has no implementation to ask for; the tracer made of it has.
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]
