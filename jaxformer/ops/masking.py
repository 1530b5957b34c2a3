"""Hiding tokens from a model that is to guess them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.typing import Array, Bool, Int, Key


class Masked(NamedTuple):
    """Tokens to show, and which of them are to be guessed."""

    tokens: Int[Array, "*B T"]
    chosen: Bool[Array, "*B T"]


def mask_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, "*B T"],
    *,
    vocab_size: int,
    mask_token: int,
    special: Sequence[int],
    rate: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> Masked:
    """Chooses tokens to be guessed, and shows most as a mask, some as others, some as they are.

    The loss is that of the tokens at the chosen places:

        shown, chosen = masking.mask_tokens(key, tokens, ...)
        logits = model.apply(params, shown, method="logits")
        loss = losses.masked_mean(losses.cross_entropy(logits, tokens, where=chosen), chosen)

    Args:
        key: The same gives the same.
        tokens: Texts.
        vocab_size: V.
        mask_token: What hides a token; special too.
        special: Tokens such as padding that are neither chosen nor shown in place of others.
        rate: Probability that a token is chosen, each by itself.
        masked: Share of the chosen that the mask hides.
        replaced: Share of the chosen in whose place any token that is not special is shown, each
            with the same probability.

    Raises:
        ValueError: If the shares are none, or every token is special.

    References:
        Devlin et al. 2019, "BERT", section 3.1. https://arxiv.org/abs/1810.04805 Its code chooses a
        fixed number in each text, and shows special tokens in place of others too.
    """
    if not 0 <= rate <= 1 or masked < 0 or replaced < 0 or masked + replaced > 1:
        raise ValueError(f"these are no shares: {rate=}, {masked=}, {replaced=}.")
    apart = {mask_token, *special}
    ordinary = np.array([token for token in range(vocab_size) if token not in apart], np.int32)
    if not ordinary.size:
        raise ValueError(f"all V={vocab_size} tokens are special.")
    for_place, for_token = jax.random.split(key)
    draw = jax.random.uniform(for_place, tokens.shape)
    may = ~jnp.isin(tokens, np.array(sorted(apart)))
    chosen = may & (draw < rate)
    others = jnp.take(ordinary, jax.random.randint(for_token, tokens.shape, 0, ordinary.size))
    shown = jnp.where(chosen & (draw < rate * (masked + replaced)), others, tokens)
    shown = jnp.where(chosen & (draw < rate * masked), mask_token, shown)
    return Masked(shown.astype(tokens.dtype), chosen)
