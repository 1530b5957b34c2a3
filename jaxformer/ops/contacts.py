"""From attention maps to contacts of residues."""

import jax.numpy as jnp

from jaxformer.typing import Array, Float


def symmetrize(x: Float[Array, "*B R R"]) -> Float[Array, "*B R R"]:
    """Adds each map to its transpose."""
    return x + x.swapaxes(-1, -2)


def average_product_correction(x: Float[Array, "*B R R"]) -> Float[Array, "*B R R"]:
    """Takes from each entry what its row and its column would make it, were they independent.

    That is `row sum * column sum / total`; a map that sums to 0 stays as it is. Rows and columns of
    the result sum to 0.

    References:
        Dunn et al. 2008, eq. 4, as sums in place of means.
        https://doi.org/10.1093/bioinformatics/btm604
    """
    rows, columns = x.sum(-1, keepdims=True), x.sum(-2, keepdims=True)
    total = rows.sum(-2, keepdims=True)
    return x - jnp.where(total == 0, 0.0, rows * columns / jnp.where(total == 0, 1.0, total))
