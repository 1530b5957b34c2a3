"""A number for each leaf of a tree that changes whenever one of its bits does."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.typing import Array, PyTree, UInt32

_Leaf = Array | np.ndarray | np.generic
_WORD = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def fingerprints(tree: PyTree) -> UInt32[Array, " leaves"]:
    """Reduces every leaf to one uint32, in the order of `jax.tree.leaves`, in one compiled pass.

    A leaf is read as 32-bit words `x`, one an element where elements are no wider than that and two
    where they are, and becomes `sum((2 i + 1) x[i]) mod 2**32` over their row-major positions `i`.
    Every weight is odd, hence invertible modulo 2**32, so a change of any one word always changes
    the number; other changes escape with probability about 2**-32. Sums modulo 2**32 do not depend
    on their order: the number is the same for every sharding and on every back end.

    The pass is dispatched and not waited for.

    Args:
        tree: Arrays of any dtype that JAX or NumPy holds, complex and typed keys included; NumPy
            arrays of 64 bits keep them whatever `jax_enable_x64` says. NaN and -0.0 count as bits.

    Returns:
        One number a leaf; 0 for a leaf without elements. An empty tree gives an empty array.
    """
    leaves = [_without_64_bits(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros(0, jnp.uint32)
    return _fingerprints(leaves)


def _without_64_bits(leaf: _Leaf) -> _Leaf:
    # jit would round a float64 and cut an int64 where x64 is off.
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.itemsize < 8:
        return leaf
    return np.ascontiguousarray(leaf)[..., None].view(np.uint32)


@jax.jit
def _fingerprints(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    return jnp.stack([_fingerprint(leaf) for leaf in leaves])


def _fingerprint(leaf: Array) -> UInt32[Array, ""]:
    words = _words(leaf)
    # Built from one iota an axis and never reshaped: each device weighs its own shard in place.
    position, stride = jnp.zeros_like(words), 1
    for axis in reversed(range(words.ndim)):
        iota = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += iota * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


def _words(leaf: Array) -> UInt32[Array, "..."]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    word = _WORD[min(jax.dtypes.itemsize_bits(leaf.dtype), 32)]
    return lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
