"""Attention layers: the projections around `ops.attention`, and the key-value cache."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxformer.layers.linear import Dense
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, with room for S in all."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "KVCache":
        """Makes a cache that holds nothing yet."""
        zeros = jnp.zeros((batch, num_kv_heads, max_length, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32))

    def append(self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]) -> "KVCache":
        """Writes T more tokens; past the end it writes NaN, since tracing cannot raise.

        Raises:
            ValueError: If T exceeds S.
        """
        count, size = keys.shape[1], self.keys.shape[2]
        if count > size:
            raise ValueError(f"the cache has room for S={size} tokens, not for T={count}.")
        bad = jnp.where(self.length + count > size, jnp.nan, 0.0).astype(self.keys.dtype)
        start = (0, 0, self.length, 0)
        new_keys, new_values = (
            lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype) + bad, start)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return KVCache(new_keys, new_values, self.length + count)


# Of a whole stack: one cache whose arrays have a leading axis if it is scanned, else one a block.
StackCache: TypeAlias = KVCache | tuple[KVCache, ...]


def cached_length(cache: StackCache) -> Int[Array, ""]:
    """Counts the tokens in the cache of a stack, whose blocks all hold as many."""
    return cache.length[0] if isinstance(cache, KVCache) else cache[0].length


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with grouped queries if `num_kv_heads` is less.

    Attributes:
        num_heads: N.
        num_kv_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        rotate: Turns queries and keys by their positions, as `rotary.rotate`; None for no rotation.
        norm: Makes a norm of the channels of each head of queries and keys; None for no QK-norm.
        use_bias: Of the projections.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the projections.
        out_init: Initializer of the output kernel; zeros make the block start as the identity.

    References:
        Vaswani et al. 2017, section 3.2. https://arxiv.org/abs/1706.03762
        Ainslie et al. 2023, "GQA". https://arxiv.org/abs/2305.13245
        Dehghani et al. 2023, section 2 (QK-norm). https://arxiv.org/abs/2302.05442
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotate: Callable[[Array, Array], Array] | None = None
    norm: Callable[..., nn.Module] | None = None
    use_bias: bool = False
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask | None = None,
        *,
        positions: Int[Array, "B T"] | Int[Array, "T"] | None = None,
        bias: Float[Array, "..."] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache]:
        """Mixes information along T.

        Args:
            x: The stream.
            mask: Who may look; all at all if None, or with a cache, each at its past. With a cache
                it is of T new tokens at all S places, and must hide those not written yet.
            positions: Place of each token for `rotate`; counted on from the cache's length, or 0.
            bias: Added to the logits; broadcasts to B N T S.
            cache: Keys and values of what came before; with it the new cache is returned too.

        Raises:
            ValueError: If D, N and K do not divide as they should.
        """
        heads, kv_heads, channels = _sizes(self, x.shape[-1])
        total = heads + 2 * kv_heads
        fused = Dense(total * channels, self.use_bias, project=self.project, name="qkv")(x)
        fused = fused.reshape(*x.shape[:2], total, channels)
        q, k, v = jnp.split(fused, [heads, heads + kv_heads], axis=2)
        if self.norm is not None:
            q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)

        offset = 0 if cache is None else cache.length
        if self.rotate is not None:
            places = offset + jnp.arange(x.shape[1]) if positions is None else positions
            q, k = self.rotate(q, places), self.rotate(k, places)
        if cache is not None:
            mask = attention.causal(offset) if mask is None else mask
            cache = cache.append(k, v)
            k, v = (part.swapaxes(1, 2).astype(q.dtype) for part in cache[:2])

        y = self.attend(q, k, v, mask, bias=bias).reshape(*x.shape[:2], heads * channels)
        y = Dense(x.shape[-1], self.use_bias, self.out_init, self.project, name="out")(y)
        return y if cache is None else (y, cache)


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one.

    Attributes:
        num_heads: N.
        num_kv_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        norm: Makes a norm of the channels of each head of queries and keys; None for no QK-norm.
        use_bias: Of the projections.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the projections.
        out_init: Initializer of the output kernel.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Callable[..., nn.Module] | None = None
    use_bias: bool = False
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S C"],
        mask: Mask | None = None,
        *,
        bias: Float[Array, "..."] | None = None,
    ) -> Float[Array, "B T D"]:
        """Brings information from S to T; the context may have another width.

        Raises:
            ValueError: If D, N and K do not divide as they should.
        """
        heads, kv_heads, channels = _sizes(self, x.shape[-1])
        q = Dense(heads * channels, self.use_bias, project=self.project, name="q")(x)
        kv = Dense(2 * kv_heads * channels, self.use_bias, project=self.project, name="kv")(context)
        q = q.reshape(*x.shape[:2], heads, channels)
        k, v = jnp.split(kv.reshape(*context.shape[:2], 2 * kv_heads, channels), 2, axis=2)
        if self.norm is not None:
            q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
        y = self.attend(q, k, v, mask, bias=bias).reshape(*x.shape[:2], heads * channels)
        return Dense(x.shape[-1], self.use_bias, self.out_init, self.project, name="out")(y)


def _sizes(layer: SelfAttention | CrossAttention, width: int) -> tuple[int, int, int]:
    """N, K and H, checked."""
    heads = layer.num_heads
    kv_heads = heads if layer.num_kv_heads is None else layer.num_kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"N={heads} is not a positive multiple of K={kv_heads}.")
    if layer.head_dim is not None:
        return heads, kv_heads, layer.head_dim
    if width % heads:
        raise ValueError(f"D={width} is not a multiple of N={heads}.")
    return heads, kv_heads, width // heads
