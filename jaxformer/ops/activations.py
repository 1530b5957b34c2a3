"""Activations, and the gated units that multiply one half of the hidden width by the other.

All work element by element, in and out in the dtype of the input; those with an exponential or an
error function compute in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * Φ(x)` with Φ the normal distribution function, exactly.

    References:
        Hendrycks and Gimpel 2016, "GELU". https://arxiv.org/abs/1606.08415
    """
    return _in_float32(lambda x: jax.nn.gelu(x, approximate=False), x)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU with Φ replaced by a tanh, up to 5e-4 away: the form of GPT-2, BERT's code and Gemma."""
    return _in_float32(lambda x: jax.nn.gelu(x, approximate=True), x)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * sigmoid(x)`, also called swish.

    References:
        Elfwing et al. 2018, "Sigmoid-weighted linear units". https://arxiv.org/abs/1702.03118
    """
    return _in_float32(jax.nn.silu, x)


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)`, with gradient 0 at 0."""
    return jax.nn.relu(x)


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)**2`.

    References:
        So et al. 2021, "Primer", section 4.1. https://arxiv.org/abs/2109.08668
    """
    return jnp.square(jax.nn.relu(x))


def xielu(
    x: Float[Array, "..."], positive: Float[Array, ""], negative: Float[Array, ""]
) -> Float[Array, "..."]:
    """`a x² + x / 2` for x > 0, else `b (expm1(x) - x) + x / 2`, with learned a > 0 and b > 1 / 2.

    Args:
        x: Anything.
        positive: The number whose softplus is a.
        negative: The number whose softplus is b - 1 / 2.

    References:
        Huang and Schlag 2024, "Deriving activation functions using integration" (xIELU), as in the
        code of Apertus, which bounds x at -1e-6 inside expm1. https://arxiv.org/abs/2411.13010
    """

    def f(x: Array) -> Array:
        a = jax.nn.softplus(positive.astype(x.dtype))
        b = 0.5 + jax.nn.softplus(negative.astype(x.dtype))
        below = (jnp.expm1(jnp.minimum(x, -1e-6)) - x) * b
        return jnp.where(x > 0, a * x * x, below) + 0.5 * x

    return _in_float32(f, x)


def glu(gate: Float[Array, "*B F"], value: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`sigmoid(gate) * value`: the first of the gated units, with an activation on one factor.

    References:
        Dauphin et al. 2017, "Gated convolutional networks". https://arxiv.org/abs/1612.08083
        Shazeer 2020, "GLU variants improve Transformer", eq. 5, this and those below.
        https://arxiv.org/abs/2002.05202
    """
    return _in_float32(jax.nn.sigmoid, gate) * value


def geglu(gate: Float[Array, "*B F"], value: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`gelu(gate) * value`, with the exact GELU."""
    return gelu(gate) * value


def swiglu(gate: Float[Array, "*B F"], value: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`silu(gate) * value`: Shazeer's Swish at β = 1, the unit of LLaMA and its kin."""
    return silu(gate) * value


def clamped_swiglu(
    gate: Float[Array, "*B F"], value: Float[Array, "*B F"], *, limit: float, steepness: float
) -> Float[Array, "*B F"]:
    """`g * sigmoid(steepness * g) * (v + 1)`, with g up to `limit` and v within ± `limit`.

    References:
        OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card", section 2.2.
        https://arxiv.org/abs/2508.10925
    """
    gate, value = jnp.minimum(gate, limit), jnp.clip(value, -limit, limit)
    return _in_float32(lambda g: g * jax.nn.sigmoid(steepness * g), gate) * (value + 1)


def reglu(gate: Float[Array, "*B F"], value: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`relu(gate) * value`."""
    return relu(gate) * value


def bilinear(gate: Float[Array, "*B F"], value: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`gate * value`, with no activation at all."""
    return gate * value


def _in_float32(f: Callable[[Array], Array], x: Array) -> Array:
    return f(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
