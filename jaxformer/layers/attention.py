"""Attention layers: the projections around `ops.attention`, and the key-value cache."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxformer.layers.linear import Dense
from jaxformer.ops import attention, linear
from jaxformer.ops.attention import Mask
from jaxformer.typing import Array, DTypeLike, Float, Int


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, with room for S in all, or for the last S of a window.

    Attributes:
        keys: Of place p at index p, or in a window at p modulo S.
        values: Likewise.
        length: Tokens so far: of all rows alike, or of each row.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S Hv"]
    length: Int[Array, ""] | Int[Array, "B"]

    @property
    def room(self) -> int:
        """S."""
        return self.keys.shape[-2]

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
        *,
        value_dim: int | None = None,
        by_row: bool = False,
    ) -> "KVCache":
        """Makes a cache that holds nothing yet, whose rows grow alike or each by itself."""
        keys, values = (
            jnp.zeros((batch, num_kv_heads, max_length, size), dtype)
            for size in (head_dim, head_dim if value_dim is None else value_dim)
        )
        return cls(keys, values, jnp.zeros((batch,) if by_row else (), jnp.int32))

    def append(
        self,
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K Hv"],
        counts: Int[Array, "B"] | None = None,
    ) -> "KVCache":
        """Writes T more tokens; past the end it writes NaN, since tracing cannot raise.

        Args:
            keys: Of the new tokens.
            values: Likewise.
            counts: How many of them are real in each row, for a cache by row; the others leave
                nothing that counts. All if None.

        Raises:
            ValueError: If T exceeds S and no counts say that fewer are real.
        """
        count, size = keys.shape[1], self.room
        if count > size and counts is None:
            raise ValueError(f"the cache has room for S={size} tokens, not for T={count}.")
        length = self.length + (count if counts is None else counts)
        bad = jnp.where(length > size, jnp.nan, 0.0).astype(self.keys.dtype)
        if self.length.ndim == 0:
            new_keys, new_values = (
                lax.dynamic_update_slice(
                    old, new.swapaxes(1, 2).astype(old.dtype) + bad, (0, 0, self.length, 0)
                )
                for old, new in ((self.keys, keys), (self.values, values))
            )
            return KVCache(new_keys, new_values, length)
        places = self.length[:, None] + jnp.arange(count)[None]
        # A row that is too long is spoilt from its first place on, so that its results show it.
        places = jnp.where(length[:, None] > size, jnp.arange(count)[None], places)
        rows = jnp.arange(keys.shape[0])[:, None]
        new_keys, new_values = (
            old.at[rows, :, places].set(
                new.astype(old.dtype) + bad[:, None, None, None], mode="drop", unique_indices=True
            )
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return KVCache(new_keys, new_values, length)

    def places(self) -> Int[Array, "#B S"]:
        """Which place of the text each index of a window holds; negative if none."""
        size = self.room
        last = self.length.reshape(-1, 1) - 1
        return last - (last - jnp.arange(size)[None]) % size

    def slide(
        self,
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K Hv"],
        counts: Int[Array, "B"] | None = None,
    ) -> "KVCache":
        """Writes T more tokens over those that lie S or more places before them."""
        count = keys.shape[1]
        length = self.length + (count if counts is None else counts)
        after = self._replace(length=length).places()
        source = after - self.length.reshape(-1, 1)
        fresh = (source >= 0)[:, None, :, None]
        source = jnp.clip(source, 0, count - 1)
        source = jnp.broadcast_to(source, (keys.shape[0], source.shape[1]))
        new_keys, new_values = (
            jnp.where(fresh, _rows(new, source).swapaxes(1, 2).astype(old.dtype), old)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return KVCache(new_keys, new_values, length)


def _rows(x: Array, places: Array) -> Array:
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


class ContextKV(NamedTuple):
    """Keys and values of a context, made once for all that looks at it."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]


class CrossCache(NamedTuple):
    """The cache of a block with cross-attention.

    Attributes:
        own: Of its self-attention.
        context: Of its cross-attention; None before the block was given the context.
    """

    own: KVCache
    context: ContextKV | None = None

    @property
    def length(self) -> Array:
        """Tokens so far."""
        return self.own.length


BlockCache: TypeAlias = KVCache | CrossCache
# Of a whole stack: one cache whose arrays have a leading axis if it is scanned, else one a block.
StackCache: TypeAlias = BlockCache | tuple[BlockCache, ...]


def cached_length(cache: StackCache) -> Int[Array, ""] | Int[Array, "B"]:
    """Counts the tokens in the cache of a stack, whose blocks all hold as many."""
    return cache.length[0] if isinstance(cache, (KVCache, CrossCache)) else cache[0].length


def select_rows(cache: StackCache, rows: Int[Array, "R"]) -> StackCache:
    """Takes rows of the batch in the cache of a stack, in any order and number."""
    axis = 0 if type(cache) is tuple else 1
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), cache)


def rewound(cache: StackCache, lengths: Int[Array, "B"]) -> StackCache:
    """Forgets the tokens from `lengths` on, in the cache of a stack whose rows grow alone."""

    def shorter(cache: Any) -> Any:
        if isinstance(cache, CrossCache):
            return cache._replace(own=shorter(cache.own))
        # An array for each layer, so that the cache can be donated.
        return cache._replace(length=jnp.copy(jnp.broadcast_to(lengths, cache.length.shape)))

    return tuple(map(shorter, cache)) if type(cache) is tuple else shorter(cache)


def places_after(cache: KVCache | None, count: int) -> Int[Array, "T"] | Int[Array, "B T"]:
    """The places of `count` tokens that come after those in the cache of a block."""
    steps = jnp.arange(count)
    if cache is None or cache.length.ndim == 0:
        return steps if cache is None else cache.length + steps
    return cache.length[:, None] + steps[None]


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with grouped queries if `num_kv_heads` is less.

    Attributes:
        num_heads: N.
        num_kv_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        rotate: Turns queries and keys by their positions, as `rope.Rope`; None for no rotation.
        norm: Makes a norm of the channels of queries and keys; None for no QK-norm.
        norm_whole: Whether it is of all heads' channels together, not of each head's.
        use_bias: Of the projections.
        key_bias: Whether the keys' has one too, if `use_bias`.
        out_bias: Of the last one; as `use_bias` if None.
        scale: Factor of the logits; H**-0.5 if None.
        softcap: Bound of the logits; None for none.
        sinks: Whether each head learns the logit of a key without a value.
        slopes: By how much each head's logits fall with distance (ALiBi); None for not at all.
        window: How many tokens each may look at, itself and those before; None for all. The cache
            of such a layer rolls.
        ahead: How many tokens after itself each may look at besides, where there is a window.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the projections.
        out_init: Initializer of the output kernel; zeros make the block start as the identity.

    References:
        Vaswani et al. 2017, section 3.2. https://arxiv.org/abs/1706.03762
        Ainslie et al. 2023, "GQA". https://arxiv.org/abs/2305.13245
        Dehghani et al. 2023, section 2 (QK-norm). https://arxiv.org/abs/2302.05442
        Press et al. 2022 (ALiBi). https://arxiv.org/abs/2108.12409
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotate: Callable[[Array, Array], Array] | None = None
    norm: Callable[..., nn.Module] | None = None
    norm_whole: bool = False
    use_bias: bool = False
    key_bias: bool = True
    out_bias: bool | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    slopes: tuple[float, ...] | None = None
    window: int | None = None
    ahead: int = 0
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask | None = None,
        *,
        positions: Int[Array, "B T"] | Int[Array, "T"] | Float[Array, "#B T A"] | None = None,
        bias: Float[Array, "..."] | None = None,
        cache: KVCache | None = None,
        counts: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache]:
        """Mixes information along T; writes its weights down if "attention" is mutable.

        Args:
            x: The stream.
            mask: Who may look; all at all if None, or with a cache, each at its past. With a cache
                it is of T new tokens at all places of the text, and must hide those not written
                yet; one that counts from the query's place needs `offset=cache.length`.
            positions: Place of each token for `rotate`, or its coordinates where `rotate` takes
                these; counted on from the cache's length, or 0.
            bias: Added to the logits; broadcasts to B N T S.
            cache: Keys and values of what came before; with it the new cache is returned too.
            counts: How many of the T tokens are real in each row, with a cache by row.

        Raises:
            ValueError: If D, N and K do not divide as they should, or a layer with a window has
                slopes, or with a cache a window ahead or a bias.
        """
        beyond = cache is not None and (self.ahead or bias is not None)
        if self.window is not None and (self.slopes or beyond):
            raise ValueError("a window goes with no slopes; with a cache, with no ahead or bias.")
        heads, kv_heads, channels = _sizes(self, x.shape[-1])
        total = heads + 2 * kv_heads
        whole_bias = self.use_bias and self.key_bias
        fused = Dense(total * channels, whole_bias, project=self.project, name="qkv")(x)
        if self.use_bias and not self.key_bias:
            sizes = {"q_bias": heads, "v_bias": kv_heads}
            q_bias, v_bias = (
                self.param(name, nn.initializers.zeros, (size * channels,)).astype(x.dtype)
                for name, size in sizes.items()
            )
            none = jnp.zeros((kv_heads * channels,), x.dtype)
            fused = fused + jnp.concatenate([q_bias, none, v_bias])[None, None]
        if self.norm is not None and self.norm_whole:
            parts = (heads * channels, (heads + kv_heads) * channels)
            q, k, v = jnp.split(fused, parts, axis=2)
            q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
            q, k, v = (y.reshape(*x.shape[:2], -1, channels) for y in (q, k, v))
        else:
            fused = fused.reshape(*x.shape[:2], total, channels)
            q, k, v = jnp.split(fused, [heads, heads + kv_heads], axis=2)
            if self.norm is not None:
                q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)

        if self.rotate is not None:
            places = places_after(cache, x.shape[1]) if positions is None else positions
            q, k = self.rotate(q, places), self.rotate(k, places)
        if cache is None and self.window is not None:
            window = attention.window(self.window - 1, self.ahead)
            mask = window if mask is None else mask & window
        elif cache is not None and self.window is not None and cache.room >= self.window:
            k, v, mask, cache = _slid(cache, k, v, mask, counts, self.window)
        elif cache is not None:  # all that it has room for is in sight
            mask = attention.causal(cache.length) if mask is None else mask
            cache = cache.append(k, v, counts)
            k, v = (part.swapaxes(1, 2).astype(q.dtype) for part in cache[:2])

        options = {"bias": bias}
        if self.slopes is not None:
            slopes = jnp.asarray(self.slopes, jnp.float32)[None, :, None, None]
            fall = slopes * jnp.arange(k.shape[1], dtype=jnp.float32)[None, None, None]
            options["bias"] = fall if bias is None else bias + fall
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.sinks:
            options["sinks"] = self.param("sinks", nn.initializers.zeros, (heads,))
        if self.is_mutable_collection("attention") and not self.is_initializing():
            self.sow("attention", "weights", attention.weights(q, k, mask, **options))
        y = self.attend(q, k, v, mask, **options).reshape(*x.shape[:2], heads * channels)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        y = Dense(x.shape[-1], out_bias, self.out_init, self.project, name="out")(y)
        return y if cache is None else (y, cache)


def _slid(
    cache: KVCache, k: Array, v: Array, mask: Mask | None, counts: Array | None, size: int
) -> tuple[Array, Array, Mask, KVCache]:
    """What T new tokens look at through a window: keys, values, who may look; and the new cache."""
    count, room = k.shape[1], cache.room
    new = cache.length.reshape(-1, 1) + jnp.arange(count)[None]
    after = cache.slide(k, v, counts)
    if room >= size + count - 1:  # what is overwritten is out of sight for the new ones
        keys, values, held = after.keys, after.values, after.places()
    else:
        if counts is not None:  # padding may be NaN, and no weight of 0 takes that away
            real = (jnp.arange(count)[None] < counts[:, None])[:, :, None, None]
            k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
        keys, values = (
            jnp.concatenate([old.astype(x.dtype), x.swapaxes(1, 2)], axis=2)
            for old, x in ((cache.keys, k), (cache.values, v))
        )
        held = jnp.concatenate([cache.places(), new], axis=1)
    back = new[:, :, None] - held[:, None]
    seen = ((held[:, None] >= 0) & (back >= 0) & (back < size))[:, None]
    seen = seen if mask is None else seen & mask.at(count, held)
    keys, values = (x.swapaxes(1, 2).astype(k.dtype) for x in (keys, values))
    return keys, values, attention.explicit(seen), after


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one.

    Attributes:
        num_heads: N.
        num_kv_heads: K, a divisor of N; N if None.
        head_dim: H; D / N if None.
        norm: Makes a norm of the channels of each head of queries and keys; None for no QK-norm.
        use_bias: Of the projections.
        out_bias: Of the last one; as `use_bias` if None.
        scale: Factor of the logits; H**-0.5 if None.
        attend: Any function with the signature of `ops.attention.attend`.
        project: The product of the projections.
        out_init: Initializer of the output kernel.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Callable[..., nn.Module] | None = None
    use_bias: bool = False
    out_bias: bool | None = None
    scale: float | None = None
    attend: Callable[..., Array] = attention.attend
    project: Callable[[Array, Array], Array] = linear.project
    out_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S C"] | ContextKV,
        mask: Mask | None = None,
        *,
        bias: Float[Array, "..."] | None = None,
        keep: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], ContextKV]:
        """Brings information from S to T, of any width; writes its weights down as SelfAttention.

        Args:
            x: The stream.
            context: What to look at, or its keys and values from a call with `keep`.
            mask: Who may look; all at all if None.
            bias: Added to the logits; broadcasts to B N T S.
            keep: Returns the keys and values too.

        Raises:
            ValueError: If D, N and K do not divide as they should.
        """
        heads, kv_heads, channels = _sizes(self, x.shape[-1])
        q = Dense(heads * channels, self.use_bias, project=self.project, name="q")(x)
        q = q.reshape(*x.shape[:2], heads, channels)
        if self.norm is not None:
            q = self.norm(name="q_norm")(q)
        if isinstance(context, ContextKV):
            kept, (k, v) = context, (part.swapaxes(1, 2).astype(q.dtype) for part in context)
        else:
            outputs = 2 * kv_heads * channels
            kv = Dense(outputs, self.use_bias, project=self.project, name="kv")(context)
            k, v = jnp.split(kv.reshape(*context.shape[:2], 2 * kv_heads, channels), 2, axis=2)
            if self.norm is not None:
                k = self.norm(name="k_norm")(k)
            kept = ContextKV(k.swapaxes(1, 2), v.swapaxes(1, 2))
        options: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        options["bias"] = bias
        if self.is_mutable_collection("attention") and not self.is_initializing():
            self.sow("attention", "weights", attention.weights(q, k, mask, **options))
        y = self.attend(q, k, v, mask, **options)
        y = y.reshape(*x.shape[:2], heads * channels)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        y = Dense(x.shape[-1], out_bias, self.out_init, self.project, name="out")(y)
        return (y, kept) if keep else y


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
