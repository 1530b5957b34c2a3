"""Transformer blocks: attention and an MLP, each inside a residual."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.attention import ContextKV, CrossCache, KVCache
from jaxformer.layers.norms import RMSNorm
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Float

Make = Callable[..., nn.Module]  # a module class or a partial of one, still to be given its name


class PreNorm(nn.Module):
    """`x + f(norm(x))`: the residual stream itself is never normalised.

    Attributes:
        inner: Makes f.
        norm: Makes the norm.
        dropout: Share of the branch's numbers set to 0 in training.
        drop_path: Probability that a sample's whole branch is left out in training, times `depth`;
            the branches that stay are scaled up, so that the expected stream is the same.
        scale_init: First value of a learned scale of each channel of the branch; None for none.

    References:
        Xiong et al. 2020, "On layer normalization". https://arxiv.org/abs/2002.04745
        Huang et al. 2016, "Stochastic depth". https://arxiv.org/abs/1603.09382
        Touvron et al. 2021, "CaiT" (LayerScale), eq. 5. https://arxiv.org/abs/2103.17239
    """

    inner: Make
    norm: Make = RMSNorm
    dropout: float = 0.0
    drop_path: float = 0.0
    scale_init: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B D"],
        *args: Any,
        onto: Float[Array, "*B D"] | None = None,
        train: bool = False,
        depth: float | Array = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Adds the branch to `x`, or to `onto`.

        Args:
            x: The stream.
            *args: Passed on to f, as are other keywords.
            onto: What the branch joins in place of `x`.
            train: Drops; needs an rng named "dropout" if there is anything to drop.
            depth: Place in the stack from 0 to 1, by which `drop_path` grows.

        Returns:
            The stream, or if f returns a pair, the stream and the second of the pair.

        Raises:
            ValueError: If `drop_path` does not lie in [0, 1).
        """
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}.")
        result = self.inner(name="inner")(self.before(x), *args, **kwargs)
        y, *extra = result if isinstance(result, tuple) else (result,)
        y = self.after(x if onto is None else onto, self.branch(y, train, depth))
        return (y, *extra) if extra else y

    def before(self, x: Array) -> Array:
        """What f is given."""
        return self.norm(name="norm")(x)

    def after(self, x: Array, y: Array) -> Array:
        """How the branch joins the stream."""
        return x + y

    def branch(self, y: Array, train: bool, depth: float | Array) -> Array:
        """Scales and drops what f returned."""
        if self.scale_init is not None:
            init = nn.initializers.constant(self.scale_init)
            scale = self.param("scale", init, (y.shape[-1],)).astype(y.dtype)
            y = y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)
        if not train:
            return y
        y = nn.Dropout(self.dropout, deterministic=False)(y)
        if self.drop_path:
            keep = 1.0 - self.drop_path * jnp.asarray(depth, jnp.float32)
            shape = y.shape[:1] + (1,) * (y.ndim - 1)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
            y = jnp.where(kept, y / keep, 0.0).astype(y.dtype)
        return y


class PostNorm(PreNorm):
    """`norm(x + f(x))`: the order of the first Transformer."""

    def before(self, x: Array) -> Array:
        return x

    def after(self, x: Array, y: Array) -> Array:
        return self.norm(name="norm")(x + y)


class NoNorm(PreNorm):
    """`x + f(x)`: for a stream that was normalised just before."""

    def before(self, x: Array) -> Array:
        return x


class SandwichNorm(PreNorm):
    """`x + norm(f(norm(x)))`: the branch is normalised on both sides.

    References:
        Ding et al. 2021, "CogView", section 2.4. https://arxiv.org/abs/2105.13290
    """

    def after(self, x: Array, y: Array) -> Array:
        return x + self.norm(name="norm_out")(y)


class BranchNorm(PreNorm):
    """`x + norm(f(x))`: the branch alone is normalised, after f.

    References:
        Team OLMo 2024, "2 OLMo 2 Furious", section 3.1. https://arxiv.org/abs/2501.00656
    """

    def before(self, x: Array) -> Array:
        return x

    def after(self, x: Array, y: Array) -> Array:
        return x + self.norm(name="norm")(y)


class ParallelBlock(nn.Module):
    """`x + attention(norm(x)) + mlp(norm(x))`, each branch with a norm of its own.

    Attributes:
        attention: Makes the self-attention.
        mlp: Makes the MLP.
        residual: Makes the residual around each: a partial of PreNorm.

    References:
        Black et al. 2022, "GPT-NeoX-20B", section 2.1.2. https://arxiv.org/abs/2204.06745
    """

    attention: Make
    mlp: Make
    residual: Make = PreNorm

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask | None = None,
        *,
        train: bool = False,
        depth: float | Array = 1.0,
        cache: KVCache | None = None,
        **kwargs: Any,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache]:
        """Passes the stream through; takes what `Block` takes, but no context."""
        drop = {"train": train, "depth": depth}
        y = self.residual(self.attention, name="attention")(x, mask, cache=cache, **kwargs, **drop)
        y, *caches = y if cache is not None else (y,)
        y = self.residual(self.mlp, name="mlp")(x, onto=y, **drop)
        return (y, *caches) if caches else y


class Block(nn.Module):
    """Self-attention, cross-attention if there is one, and an MLP, each inside a residual.

    Attributes:
        attention: Makes the self-attention.
        mlp: Makes the MLP.
        cross: Makes the cross-attention; None for none.
        residual: Makes the residual around each: a partial of PreNorm, PostNorm or SandwichNorm.
        attention_residual: The same around the self-attention, if it is another.
    """

    attention: Make
    mlp: Make
    cross: Make | None = None
    residual: Make = PreNorm
    attention_residual: Make | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask | None = None,
        *,
        context: Float[Array, "B S C"] | None = None,
        context_mask: Mask | None = None,
        cache: KVCache | CrossCache | None = None,
        train: bool = False,
        depth: float | Array = 1.0,
        **kwargs: Any,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache | CrossCache]:
        """Passes the stream through; with a cache the new cache is returned too.

        What is not named goes to the self-attention: `bias`, `positions`, `counts`. A `CrossCache`
        keeps the keys and values of the context, and stands for it where they are known.

        Raises:
            ValueError: If there is cross-attention but no context, or the other way round.
        """
        own, known = cache if isinstance(cache, CrossCache) else (cache, None)
        seen = context if known is None else known
        if (seen is None) != (self.cross is None) or None not in (context, known):
            raise ValueError(
                "a block needs a context if it has cross-attention, and only then: itself, or its "
                "keys and values in the cache, not both."
            )
        drop = {"train": train, "depth": depth}
        residual = (self.attention_residual or self.residual)(self.attention, name="attention")
        x = residual(x, mask, cache=own, **kwargs, **drop)
        x, *caches = x if own is not None else (x,)
        if self.cross is not None:
            x, *kept = self._crossed(x, seen, context_mask, cache, drop)
            caches = [CrossCache(*caches, *kept)] if kept else caches
        x = self.residual(self.mlp, name="mlp")(x, **drop)
        return (x, caches[0]) if caches else x

    def _crossed(
        self, x: Array, context: Any, mask: Mask | None, cache: Any, drop: dict[str, Any]
    ) -> tuple[Array, ContextKV] | tuple[Array]:
        keep = {"keep": True} if isinstance(cache, CrossCache) else {}
        y = self.residual(self.cross, name="cross")(x, context, mask, **keep, **drop)
        return y if keep else (y,)
