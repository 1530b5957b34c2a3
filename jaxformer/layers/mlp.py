"""The position-wise half of a Transformer block."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.linear import Dense
from jaxformer.ops import activations, linear
from jaxformer.typing import Array, Float


class XIELU(nn.Module):
    """`activations.xielu` with its two learned numbers."""

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies it to each element."""
        positive = self.param("positive", nn.initializers.constant(_softplus_inverse(0.8)), ())
        negative = self.param("negative", nn.initializers.constant(_softplus_inverse(0.3)), ())
        return activations.xielu(x, positive, negative)


def _softplus_inverse(y: float) -> float:
    return math.log(math.expm1(y))


class MLP(nn.Module):
    """Widens to `hidden` channels, applies an activation, and narrows again.

    Attributes:
        hidden: F.
        activation: Any elementwise function, or the class of a module that is one.
        use_bias: Of both maps.
        project: The product of both maps.
        out_init: Initializer of the second kernel; zeros make the block start as the identity.
    """

    hidden: int
    activation: Callable[[Array], Array] | type[nn.Module] = activations.gelu
    use_bias: bool = False
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps every position alike."""
        up = Dense(self.hidden, self.use_bias, project=self.project, name="up")
        down = Dense(x.shape[-1], self.use_bias, self.out_init, self.project, name="down")
        activation: Any = self.activation
        if isinstance(activation, type):
            activation = activation(name="activation")
        return down(activation(up(x)))


class GatedMLP(nn.Module):
    """Widens to two times `hidden` channels, of which one half gates the other, and narrows again.

    Attributes:
        hidden: F.
        unit: Joins the gate and the value: `activations.swiglu`, `geglu`, `glu`, ...
        use_bias: Of both maps.
        project: The product of both maps.
        out_init: Initializer of the second kernel; zeros make the block start as the identity.

    References:
        Shazeer 2020, "GLU variants improve Transformer". https://arxiv.org/abs/2002.05202
    """

    hidden: int
    unit: Callable[[Array, Array], Array] = activations.swiglu
    use_bias: bool = False
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps every position alike; the first F channels of the wide map are the gate."""
        up = Dense(2 * self.hidden, self.use_bias, project=self.project, name="up")
        down = Dense(x.shape[-1], self.use_bias, self.out_init, self.project, name="down")
        return down(self.unit(*jnp.split(up(x), 2, axis=-1)))
