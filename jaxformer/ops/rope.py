"""Recipes of rotary positions: which channels turn, how fast, and how that stretches."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxformer.ops import rotary
from jaxformer.typing import Array, Float, Int

KINDS = ("plain", "linear", "dynamic", "yarn", "llama3")


def yarn_gain(factor: float, times: float = 1.0) -> float:
    """By how much YaRN scales queries and keys; `times` is its mscale."""
    return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Turns queries and keys by their positions: `rope(x, positions)`.

    Attributes:
        theta: Ratio base of the wavelengths.
        fraction: Share of the channels of a head, from the first on, that turns.
        interleaved: Pairs neighbours rather than halves.
        kind: How positions beyond those trained on are met: not at all ("plain"); by slowing all
            frequencies ("linear"); by a larger base once the text is longer than `length`
            ("dynamic", NTK-aware); by slowing only what turned less than once in `length` tokens,
            smoothly ("yarn", which also scales the logits; "llama3").
        factor: How many times longer the text may be.
        length: Tokens trained on before stretching.
        fast: "yarn" leaves frequencies alone that turned this often or more ("llama3": that have
            wavelengths of `length / fast` tokens or less).
        slow: And slows those by the whole factor that turned this often or less (likewise).
        gain: Factor of the turned channels; None is 1, or for "yarn" 0.1 log(factor) + 1.
        truncate: Whether "yarn" rounds its bounds to whole channels.

    References:
        Chen et al. 2023, "Position interpolation" (linear). https://arxiv.org/abs/2306.15595
        Peng et al. 2023, "YaRN" (NTK-aware and YaRN). https://arxiv.org/abs/2309.00071
        Llama team 2024, "The Llama 3 herd of models", and the code of Llama 3.1.
        https://arxiv.org/abs/2407.21783
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    kind: str = "plain"
    factor: float = 1.0
    length: int = 0
    fast: float = 32.0
    slow: float = 1.0
    gain: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind of rotary positions {self.kind!r}; {KINDS=}.")
        if self.theta <= 0 or self.factor <= 0 or not 0 < self.fraction <= 1:
            raise ValueError(f"theta and factor must be positive, fraction in (0, 1], got {self}.")
        if self.kind in ("dynamic", "yarn", "llama3") and self.length < 1:
            raise ValueError(f"{self.kind!r} needs the length trained on, got {self.length=}.")

    def __call__(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"] | Int[Array, "T"]
    ) -> Float[Array, "B T N H"]:
        """Turns queries or keys.

        Raises:
            ValueError: If the share of channels is no even number.
        """
        gain = self.gain
        if gain is None:
            gain = yarn_gain(self.factor) if self.kind == "yarn" else 1.0
        return rotary.rotate(
            x,
            positions,
            interleaved=self.interleaved,
            frequencies=self.frequencies(x.shape[-1], positions),
            gain=gain,
        )

    def frequencies(self, head_dim: int, positions: Array | None = None) -> Array:
        """Radians a token of each pair that turns; "dynamic" looks at the largest position."""
        channels = int(head_dim * self.fraction)
        powers = np.arange(0, channels, 2, dtype=np.float32) / channels
        if self.kind == "dynamic":
            longest = self.length if positions is None else jnp.max(positions) + 1
            stretch = self.factor * jnp.maximum(longest, self.length) / self.length
            base = self.theta * (stretch - (self.factor - 1)) ** (channels / (channels - 2))
            return 1.0 / base**powers
        plain = 1.0 / np.float32(self.theta) ** powers
        if self.kind == "linear":
            return jnp.asarray(plain / np.float32(self.factor))
        if self.kind == "plain":
            return jnp.asarray(plain)
        kept = self._yarn(channels) if self.kind == "yarn" else self._llama3(plain)
        slowed = plain / np.float32(self.factor)
        return jnp.asarray((slowed * (1 - kept) + plain * kept).astype(np.float32))

    def _yarn(self, channels: int) -> np.ndarray:
        """How much of each frequency stays, from 0 to 1."""

        def pair_turning(times: float) -> float:
            ratio = math.log(self.length / (times * 2 * math.pi))
            return channels * ratio / (2 * math.log(self.theta))

        low, high = pair_turning(self.fast), pair_turning(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        high += 0.001 if low == high else 0.0
        ramp = (np.arange(channels // 2, dtype=np.float32) - low) / (high - low)
        return 1 - np.clip(ramp, 0, 1)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.length * plain / (2 * math.pi)
        return np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class GridRope:
    """Turns queries and keys by their coordinates on a grid of patches: `rope(x, coordinates)`.

    A token whose coordinates are all 0 is not turned.

    Attributes:
        theta: Ratio base of the wavelengths.
        unit: Radians that the fastest pair turns for a coordinate of 1.
        interleaved: The form of V-JEPA 2, for weights that were trained with it: each axis turns
            neighbours in a share of the channels, the same in all shares, the two neighbours by
            the angles of different frequencies. If not, that of DINOv3: halves are paired over the
            whole head, and each axis has an equal share of the pairs.

    References:
        Heo et al. 2024, "Rotary position embedding for vision transformer", section 3.2.
        https://arxiv.org/abs/2403.13298
        Siméoni et al. 2025, "DINOv3", section 3.2. https://arxiv.org/abs/2508.10104
        Assran et al. 2025, "V-JEPA 2", section 2.1. https://arxiv.org/abs/2506.09985
    """

    theta: float = 100.0
    unit: float = 2 * math.pi
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ValueError(f"rotary positions need theta > 0, got {self.theta=}.")

    def __call__(
        self, x: Float[Array, "B T N H"], coordinates: Float[Array, "#B T A"]
    ) -> Float[Array, "B T N H"]:
        """Turns queries or keys; angles are in float32.

        Raises:
            ValueError: If H is no multiple of 2·A, or with `interleaved` is less.
        """
        axes, head_dim = coordinates.shape[-1], x.shape[-1]
        pairs = head_dim // (2 * axes)
        if pairs == 0 or (head_dim % (2 * axes) and not self.interleaved):
            raise ValueError(f"GridRope needs H to be a multiple of 2·A; H={head_dim}, A={axes}.")
        powers = np.arange(pairs, dtype=np.float32) / np.float32(pairs)
        frequencies = jnp.asarray(np.float32(self.unit) / np.float32(self.theta) ** powers)
        angles = coordinates[..., None].astype(jnp.float32) * frequencies[None, None, None]
        if self.interleaved:
            angles = jnp.concatenate([angles, angles], axis=-1)
            angles = angles.reshape(*coordinates.shape[:2], -1)
            rest = head_dim - angles.shape[-1]
            angles = jnp.pad(angles, ((0, 0), (0, 0), (0, rest)))
        else:
            angles = jnp.tile(angles.reshape(*coordinates.shape[:2], -1), 2)
        angles, x32 = angles[:, :, None], x.astype(jnp.float32)
        turned = x32 * jnp.cos(angles) + self._across(x32) * jnp.sin(angles)
        return turned.astype(x.dtype)

    def coordinates(self, grid: tuple[int, ...]) -> np.ndarray:
        """The places of P patches on A axes, the last axis fastest, as float32 `P A`.

        They are the patches' numbers, or without `interleaved` their centres on axes that run from
        -1 to 1.
        """
        steps = [np.arange(n, dtype=np.float32) for n in grid]
        if not self.interleaved:
            steps = [2 * (step + 0.5) / n - 1 for step, n in zip(steps, grid)]
        mesh = np.meshgrid(*steps, indexing="ij")
        return np.stack(mesh, axis=-1).reshape(-1, len(grid)).astype(np.float32)

    def _across(self, x: Array) -> Array:
        """Each channel's partner, a quarter turn ahead."""
        if self.interleaved:
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([-right, left], axis=-1)
