"""Steering a model: further towards what a text says, and within a part of the vocabulary.

Each makes a model of a model, so that all loops and samplers go with it. Here a caption guides the
tokens of an image, away from what the model writes after no caption:

    decode = jax.tree_util.Partial(model.apply, params)
    cache = model.empty_cache(2 * len(captions), length)
    cache = guidance.branch(decode, cache, jnp.concatenate([captions, no_captions]))
    steered = guidance.restricted(guidance.guided(decode, 2.0), is_image)
    generate(steered, cache, begin_of_image, steps=steps, sample=sampler(), key=key)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxformer.generation import loop
from jaxformer.generation.loop import Cache, Decode
from jaxformer.typing import Array, Bool, Float, Int


def guide(
    logits: Float[Array, "*B V"],
    without: Float[Array, "*B V"],
    scale: float | Float[Array, ""],
) -> Float[Array, "*B V"]:
    """Moves logits away from those without the condition, in float32.

    The probabilities become those of `p(x | c)**scale * p(x)**(1 - scale)`, so 1 changes nothing
    and 0 forgets the condition. A token at -inf in either stays out. It does not matter what
    constant is added to either, since softmax takes it away.

    References:
        Ho and Salimans 2022, "Classifier-free diffusion guidance", eq. 6, with `scale` for their
        `1 + w`. https://arxiv.org/abs/2207.12598
        Gafni et al. 2022, "Make-A-Scene", section 3.4: of logits of tokens.
        https://arxiv.org/abs/2203.13131
    """
    wide, other = logits.astype(jnp.float32), without.astype(jnp.float32)
    out = jnp.isneginf(wide) | jnp.isneginf(other)
    moved = wide + (scale - 1) * (wide - other)
    return jnp.where(out, -jnp.inf, moved).astype(logits.dtype)


def keep_only(logits: Float[Array, "*B V"], allowed: Bool[Array, "V2"]) -> Float[Array, "*B V"]:
    """Refuses every token that is not allowed; at least one is to be.

    Raises:
        ValueError: If `allowed` is not of V tokens.
    """
    if allowed.shape != logits.shape[-1:]:
        raise ValueError(f"allowed={allowed.shape} tokens of a vocabulary V={logits.shape[-1]}.")
    shape = (1,) * (logits.ndim - 1) + (-1,)
    return jnp.where(allowed.reshape(shape), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """The cache of a guided model: B texts with their condition, and the same texts without.

    As a `loop.RowCache` it has B rows, whose lengths are those with the condition.

    Attributes:
        rows: The model's own cache, of 2 B rows, those with the condition first.
    """

    rows: Cache

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each text so far."""
        return jnp.split(self.rows.length, 2)[0]

    @property
    def max_length(self) -> int | None:
        """Tokens that a text has room for, if the model's cache tells."""
        return getattr(self.rows, "max_length", None)

    @property
    def max_rewind(self) -> int | None:
        """Tokens that `rewind` can forget; None for all."""
        return getattr(self.rows, "max_rewind", None)

    def select(self, rows: Int[Array, "B2"]) -> "Branches":
        """Takes texts, with both of their rows."""
        batch = self.rows.length.shape[0] // 2
        return Branches(self.rows.select(jnp.concatenate([rows, rows + batch])))

    def rewind(self, lengths: Int[Array, "B"]) -> "Branches":
        """Forgets as many tokens of both rows as lie beyond `lengths` in the one."""
        surplus = self.length - lengths
        return Branches(self.rows.rewind(self.rows.length - jnp.concatenate([surplus, surplus])))


def branch(
    decode: Decode,
    cache: Cache,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"] | None = None,
) -> Branches:
    """Reads all that the two branches do not share.

    Args:
        decode: The model, as in `generation.loop`.
        cache: Of R = 2 B rows, empty or of what came before.
        prompts: The B prompts with the condition, then the B without it. What follows, from the
            prompt of `decode.complete` on, is the same for both.
        lengths: Tokens of each, from 1 to P; all have P if None.

    Raises:
        ValueError: If R is odd.
    """
    if prompts.shape[0] % 2:
        raise ValueError(f"two branches have an even number of rows, got R={prompts.shape[0]}.")
    if lengths is None:
        lengths = jnp.full(prompts.shape[0], prompts.shape[1], jnp.int32)
        return Branches(loop.prefill(decode, cache, prompts, lengths, ragged=False)[1])
    return Branches(loop.prefill(decode, cache, prompts, lengths, ragged=True)[1])


def guided(decode: Decode, scale: float | Float[Array, ""]) -> Partial:
    """Makes the model that classifier-free guidance gives; its cache is `Branches`.

    It costs two rows of the model for each text, in one call. A tree, so that neither another
    scale nor other parameters in a `Partial` compile anything anew.

    Args:
        decode: The model.
        scale: Of `guide`.
    """
    return Partial(_guided, _tree(decode), scale)


def restricted(decode: Decode, allowed: Bool[Array, "V"]) -> Partial:
    """Makes the model that writes allowed tokens alone, by `keep_only`; its cache stays the same.

    Scores and log-probabilities are then of these tokens alone.
    """
    return Partial(_restricted, _tree(decode), allowed)


def _guided(
    decode: Decode,
    scale: Any,
    tokens: Int[Array, "B T"],
    cache: Branches,
    counts: Int[Array, "B"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B #T V"], Branches]:
    counts = None if counts is None else jnp.concatenate([counts, counts])
    decode = functools.partial(decode, **options)
    both, rows = loop.call(decode, jnp.concatenate([tokens, tokens]), cache.rows, counts)
    logits, without = jnp.split(both, 2)
    return guide(logits, without, scale), Branches(rows)


def _restricted(
    decode: Decode, allowed: Bool[Array, "V"], *inputs: Any, **options: Any
) -> tuple[Float[Array, "B #T V"], Cache]:
    logits, cache = decode(*inputs, **options)
    return keep_only(logits, allowed), cache


def _tree(decode: Decode) -> Partial:
    return decode if isinstance(decode, Partial) else Partial(decode)
