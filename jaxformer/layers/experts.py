"""A mixture of experts in place of an MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.block import Make
from jaxformer.layers.linear import Dense
from jaxformer.ops import activations, experts
from jaxformer.typing import Array, Float

_INIT = nn.initializers.lecun_normal(batch_axis=(0,))


class Experts(nn.Module):
    """Gated MLPs of which each position takes a few, weighted, and perhaps one for all beside.

    The router's logits are sown as `router_logits` into `intermediates`, for
    `ops.experts.load_balance`.

    Attributes:
        num_experts: E.
        count: Experts of a position.
        hidden: F of each.
        unit: Joins the gate and the value.
        use_bias: Of the experts' maps and the router.
        correct: Whether the router has a correction of its choice, for which `route` is called as
            `route_sigmoid` is; else as `route_softmax`.
        route: Chooses and weights.
        shared: Makes what all positions take besides; None for nothing.
    """

    num_experts: int
    count: int
    hidden: int
    unit: Callable[[Array, Array], Array] = activations.swiglu
    use_bias: bool = False
    correct: bool = False
    route: Callable[..., tuple[Array, Array]] = experts.route_softmax
    shared: Make | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps every position by its experts."""
        rows = x.reshape(-1, x.shape[-1])
        logits = Dense(self.num_experts, self.use_bias, name="router")(rows.astype(jnp.float32))
        self.sow("intermediates", "router_logits", logits)
        more = ()
        if self.correct:
            more = (self.param("correction", nn.initializers.zeros, (self.num_experts,)),)
        weights, chosen = self.route(logits, self.count, *more)

        def maps(name: str, inputs: int, outputs: int) -> tuple[Array, Array | None]:
            shape = (self.num_experts, inputs, outputs)
            kernel = self.param(f"{name}_kernel", _INIT, shape).astype(x.dtype)
            if not self.use_bias:
                return kernel, None
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.num_experts, outputs))
            return kernel, bias.astype(x.dtype)

        up, down = maps("up", x.shape[-1], 2 * self.hidden), maps("down", self.hidden, x.shape[-1])

        def compute(rows: Array, sizes: Array, who: Array) -> Array:
            def apply(x: Array, kernel: Array, bias: Array | None) -> Array:
                y = jax.lax.ragged_dot(x, kernel, sizes)
                return y if bias is None else y + bias[who]

            return apply(self.unit(*jnp.split(apply(rows, *up), 2, axis=-1)), *down)

        y = experts.mix(rows, weights, chosen, self.num_experts, compute).reshape(x.shape)
        return y if self.shared is None else y + self.shared(name="shared")(x)
