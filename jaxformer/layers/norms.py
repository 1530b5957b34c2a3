"""Normalisation layers: the parameters around `ops.norms`, whose arithmetic is in float32."""

from flax import linen as nn

from jaxformer.ops import norms
from jaxformer.typing import Array, Float


class RMSNorm(nn.Module):
    """Divides each row by its root mean square and scales the channels.

    Attributes:
        epsilon: Added to the mean square.
        plus_one: Scales by 1 + w rather than by w, as Gemma does.
    """

    epsilon: float = 1e-6
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        if self.plus_one:
            scale = 1 + self.param("scale", nn.initializers.zeros, (x.shape[-1],))
            return norms.rms_norm(x, scale, epsilon=self.epsilon)
        return norms.rms_norm(x, *_parameters(self, x, use_bias=False), epsilon=self.epsilon)


class LayerNorm(nn.Module):
    """Shifts and scales each row to mean 0 and variance 1, then scales and shifts the channels.

    Attributes:
        use_bias: Learns the shift as well as the scale.
        epsilon: Added to the variance.
    """

    use_bias: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        return norms.layer_norm(x, *_parameters(self, x, self.use_bias), epsilon=self.epsilon)


class GroupNorm(nn.Module):
    """Normalises each group of channels over all positions of a sample.

    Attributes:
        num_groups: Groups; must divide D.
        epsilon: Added to the variance.
    """

    num_groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B *space D"]) -> Float[Array, "B *space D"]:
        """Normalises over the positions and the channels of a group."""
        parameters = _parameters(self, x, use_bias=True)
        return norms.group_norm(x, self.num_groups, *parameters, epsilon=self.epsilon)


class BatchNorm(nn.Module):
    """Normalises each channel over the batch; keeps running statistics in `batch_stats`.

    Attributes:
        momentum: Share of the old running statistics that stays at each training step.
        epsilon: Added to the variance.
        axis_name: Mapped axis over which the statistics are shared, under pmap or shard_map.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], train: bool = False) -> Float[Array, "*B D"]:
        """Uses the batch's own statistics and updates the running ones if `train`."""
        width = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", nn.initializers.zeros, None, width)
        variance = self.variable("batch_stats", "variance", nn.initializers.ones, None, width)
        scale, bias = _parameters(self, x, use_bias=True)
        running = (mean.value, variance.value)
        if not train:
            return norms.batch_norm_inference(x, *running, scale, bias, epsilon=self.epsilon)
        y, updated = norms.batch_norm(
            x,
            *running,
            scale,
            bias,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=None if self.is_initializing() else self.axis_name,
        )
        if not self.is_initializing():
            mean.value, variance.value = updated
        return y


def _parameters(module: nn.Module, x: Array, use_bias: bool) -> tuple[Array, Array | None]:
    width = (x.shape[-1],)
    scale = module.param("scale", nn.initializers.ones, width)
    return scale, module.param("bias", nn.initializers.zeros, width) if use_bias else None
