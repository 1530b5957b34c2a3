"""Attention whose keys and values are made of one short vector a token."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.attention import KVCache, places_after
from jaxformer.layers.linear import Dense
from jaxformer.layers.norms import RMSNorm
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, Float, Int


class LatentAttention(nn.Module):
    """Multi-head latent attention: what the cache holds of a token is R + P numbers for all heads.

    With a cache, the map from latents to keys moves over to the queries, and the one to values
    behind the sum, so that all heads attend to the latents themselves.

    Attributes:
        num_heads: N.
        head_dim: Channels of a head that do not turn with position.
        rotary_dim: P, those that do; the keys' are the same for all heads.
        value_dim: Hv.
        rank: R, channels of the latent.
        query_rank: Channels through which queries are made; None for directly.
        rotate: Turns queries and keys, as `rope.Rope`.
        use_bias: Of the maps to latents and of the last one.
        scale: Factor of the logits; (head_dim + rotary_dim)**-0.5 if None.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of all maps but those from latents to keys and values.

    References:
        DeepSeek-AI 2024, "DeepSeek-V2", section 2.1. https://arxiv.org/abs/2405.04434
    """

    num_heads: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    rank: int
    query_rank: int | None = None
    rotate: Callable[[Array, Array], Array] | None = None
    use_bias: bool = False
    scale: float | None = None
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask | None = None,
        *,
        positions: Int[Array, "B T"] | Int[Array, "T"] | None = None,
        bias: Float[Array, "..."] | None = None,
        cache: KVCache | None = None,
        counts: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache]:
        """Mixes information along T; the arguments are those of `SelfAttention`.

        The cache has one head, of R + P channels, and no values.
        """
        batch, length, width = x.shape
        heads, plain, turning = self.num_heads, self.head_dim, self.rotary_dim
        made = x
        if self.query_rank is not None:
            made = Dense(self.query_rank, self.use_bias, project=self.project, name="q_down")(x)
            made = RMSNorm(name="q_norm")(made)
        q = Dense(heads * (plain + turning), project=self.project, name="q")(made)
        q, q_turned = jnp.split(q.reshape(batch, length, heads, plain + turning), [plain], axis=3)
        down = Dense(self.rank + turning, self.use_bias, project=self.project, name="kv_down")
        latent, k_turned = jnp.split(down(x)[:, :, None], [self.rank], axis=3)
        latent = RMSNorm(name="kv_norm")(latent)
        up = self.param(
            "kv_up", nn.initializers.lecun_normal(), (self.rank, heads * (plain + self.value_dim))
        ).astype(x.dtype)
        to_keys, to_values = jnp.split(up.reshape(self.rank, heads, -1), [plain], axis=2)
        if self.rotate is not None:
            places = places_after(cache, length) if positions is None else positions
            q_turned, k_turned = self.rotate(q_turned, places), self.rotate(k_turned, places)
        scale = (plain + turning) ** -0.5 if self.scale is None else self.scale

        if cache is None:
            k = jnp.einsum("bsir,rnh->bsnh", latent, to_keys)
            k = jnp.concatenate([k, jnp.broadcast_to(k_turned, (*k.shape[:3], turning))], axis=3)
            v = jnp.einsum("bsir,rnh->bsnh", latent, to_values)
            q = jnp.concatenate([q, q_turned], axis=3)
            y = self.attend(q, k, v, mask, bias=bias, scale=scale)
        else:
            mask = attention.causal(cache.length) if mask is None else mask
            new = jnp.concatenate([latent, k_turned], axis=3)
            cache = cache.append(new, new[..., :0], counts)
            k = cache.keys.swapaxes(1, 2).astype(x.dtype)
            q = jnp.einsum("btnh,rnh->btnr", q, to_keys)
            q = jnp.concatenate([q, q_turned], axis=3)
            y = self.attend(q, k, k[..., : self.rank], mask, bias=bias, scale=scale)
            y = jnp.einsum("btnr,rnh->btnh", y, to_values)
        y = y.reshape(batch, length, heads * self.value_dim)
        y = Dense(width, self.use_bias, project=self.project, name="out")(y)
        return y if cache is None else (y, cache)
