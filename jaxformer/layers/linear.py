"""Learned linear maps."""

from collections.abc import Callable

from flax import linen as nn

from jaxformer.ops import linear
from jaxformer.typing import Array, Float

Initializer = Callable[..., Array]


class Dense(nn.Module):
    """Maps the last axis to `features` channels: `x @ kernel + bias`.

    The kernel is I × O in float32, and is used in the dtype of `x`.

    Attributes:
        features: O.
        use_bias: Adds a learned vector, zeros at first.
        kernel_init: Initializer of the kernel.
        project: The product, such as `linear.project_input_first`.
    """

    features: int
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    project: Callable[[Array, Array], Array] = linear.project

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Maps every row of `x` alike."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = self.project(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y
