"""Attention: one function, `attend`, and the masks that say who may look at whom.

For example, for texts of different lengths in one batch:

    from jaxformer.ops import attention

    y = attention.attend(q, k, v, attention.causal() & attention.key_lengths(lengths))
"""

from jaxformer.ops.attention.dense import attend, weights
from jaxformer.ops.attention.masks import (
    Mask,
    causal,
    coarse,
    explicit,
    key_lengths,
    local_global,
    prefix,
    segments,
    strided,
    window,
)

__all__ = [
    "Mask",
    "attend",
    "causal",
    "coarse",
    "explicit",
    "key_lengths",
    "local_global",
    "prefix",
    "segments",
    "strided",
    "weights",
    "window",
]
