"""Products of activations with a weight matrix."""

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float


def project(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """Multiplies the last axis of `x` by `kernel`: the plain form."""
    return x @ kernel


@jax.custom_vjp
def project_input_first(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"]
) -> Float[Array, "*B O"]:
    """`project`, with the kernel's gradient computed in the order that suits a CPU.

    Autodiff puts the gradient of the output on the left of that product, and XLA on CPU lays its
    left operand out anew, together with whatever elementwise work leads up to it. Where the output
    is wider than the input, as in the first half of an MLP, it is cheaper to turn the input: 1.2
    times on a whole training step with GELU. The price is that there is no forward mode.

    Values and gradients are those of `project`, up to the order of summation.
    """
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if x.shape[-1] < gradient.shape[-1]:
        for_kernel = jnp.einsum("ri,ro->io", rows, columns)
    else:
        turned = jnp.einsum("ro,ri->oi", columns, rows)
        half = turned.shape[0] // 2  # XLA would undo a transpose of the whole product
        for_kernel = jnp.concatenate([turned[:half].T, turned[half:].T], axis=1)
    return (gradient @ kernel.T).astype(x.dtype), for_kernel.astype(kernel.dtype)


project_input_first.defvjp(_forward, _backward)
