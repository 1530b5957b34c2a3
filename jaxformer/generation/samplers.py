"""Choosing the next token from its logits: filters that compose, and the samplers made of them.

A filter takes logits and returns logits of the same shape and dtype, with the tokens it refuses at
`-inf`. A sampler takes a key and the logits of the next token and returns one token a row.

    sample = samplers.sampler(temperature=0.8, top_k=8)
    tokens = sample(key, logits)

Four rules hold for every filter: the best token always stays; tokens of equal logits stay or go
together, so that the order of the vocabulary never matters; a token at `-inf` never comes back;
comparisons are made in float32. The repetition penalty refuses nothing: it changes logits, and
needs to know which tokens have been seen.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.typing import Array, Bool, Float, Int, Key

Sample = Callable[..., Int[Array, "B"]]  # of a key and logits; `seen` besides, where it is tracked


def penalize_repetition(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float
) -> Float[Array, "*B V"]:
    """Makes seen tokens less likely: divides logits above 0 by the penalty, multiplies the others.

    A penalty below 1 makes them more likely; 1 changes nothing. How often one was seen is the same.

    Raises:
        ValueError: If `penalty` is not a positive finite number.

    References:
        Keskar et al. 2019, "CTRL", section 4.1. https://arxiv.org/abs/1909.05858 (the paper divides
        negative logits too, which makes them likelier; we multiply, as Hugging Face transformers).
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalize_repetition needs a finite penalty > 0, got {penalty=}.")
    wide = logits.astype(jnp.float32)
    penalized = jnp.where(wide < 0, wide * penalty, wide / penalty)
    return jnp.where(seen, penalized, wide).astype(logits.dtype)


def seen_tokens(
    tokens: Int[Array, "B T"], lengths: Int[Array, "B"], vocab_size: int
) -> Bool[Array, "B V"]:
    """Marks which tokens occur among the first `lengths` of each row; those outside V nowhere."""
    rows, columns = jnp.arange(tokens.shape[0])[:, None], jnp.arange(tokens.shape[1])[None]
    marked = jnp.where((columns < lengths[:, None]) & (tokens >= 0), tokens, vocab_size)
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, marked].set(True, mode="drop")


def temper(logits: Float[Array, "*B V"], temperature: float) -> Float[Array, "*B V"]:
    """Divides logits by a temperature: below 1 the likely tokens gain, above 1 they lose.

    Raises:
        ValueError: If `temperature` is not a positive finite number; for the limit 0 see `greedy`.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temper needs a finite temperature > 0, got {temperature}; 0 is the sampler greedy()."
        )
    return (logits.astype(jnp.float32) / temperature).astype(logits.dtype)


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """Keeps the `k` best tokens, and those equal to the last of them; all if `k` is V or more.

    Raises:
        ValueError: If `k` is below 1.

    References:
        Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.
        https://arxiv.org/abs/1805.04833
    """
    if k < 1:
        raise ValueError(f"keep_top_k needs k >= 1, got k={k}.")
    best, _ = jax.lax.top_k(logits.astype(jnp.float32), min(k, logits.shape[-1]))
    return _keep_from(logits, best[..., -1:])


def keep_top_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """Keeps the fewest best tokens whose probabilities sum to at least `p`, and their equals.

    `p = 1` changes nothing. The sum is taken from the unlikely end, where float32 still tells
    the terms apart when `p` is close to 1.

    Raises:
        ValueError: If `p` is outside (0, 1].

    References:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", eq. 2.
        https://arxiv.org/abs/1904.09751 (the paper leaves ties open; we keep all of them).
    """
    if not 0 < p <= 1:
        raise ValueError(f"keep_top_p needs 0 < p <= 1, got p={p}.")
    if p == 1:
        return logits
    ascending = jnp.sort(logits.astype(jnp.float32), axis=-1)
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    dropped = jnp.sum(tail <= 1 - p, axis=-1, keepdims=True)
    worst = jnp.minimum(dropped, logits.shape[-1] - 1)  # rounding may push even the best under
    return _keep_from(logits, jnp.take_along_axis(ascending, worst, axis=-1))


def keep_min_p(logits: Float[Array, "*B V"], p: float) -> Float[Array, "*B V"]:
    """Keeps the tokens at least `p` times as probable as the best one; all if `p` is 0.

    Raises:
        ValueError: If `p` is outside [0, 1].

    References:
        Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
        https://arxiv.org/abs/2407.01082
    """
    if not 0 <= p <= 1:
        raise ValueError(f"keep_min_p needs 0 <= p <= 1, got p={p}.")
    if p == 0:
        return logits
    best = jnp.max(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return _keep_from(logits, best + math.log(p))


def _keep_from(
    logits: Float[Array, "*B V"], threshold: Float[Array, "*B 1"]
) -> Float[Array, "*B V"]:
    return jnp.where(logits.astype(jnp.float32) >= threshold, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A draw from the filtered distribution; equal settings are equal, so `jit` compiles once."""

    repetition_penalty: float | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    def filtered(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None = None
    ) -> Float[Array, "*B V"]:
        """Applies the filters in the order of the fields, in float32; what is None is left out.

        Raises:
            ValueError: If there is a repetition penalty and `seen` is None.
        """
        logits = temper(_penalized(logits, seen, self.repetition_penalty), self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits

    def __call__(
        self,
        key: Key[Array, ""],
        logits: Float[Array, "B V"],
        seen: Bool[Array, "B V"] | None = None,
    ) -> Int[Array, "B"]:
        """Draws one token a row, independently; the same key gives the same tokens."""
        return jax.random.categorical(key, self.filtered(logits, seen))


def sampler(
    *,
    repetition_penalty: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """Makes a sampler of the filters asked for, in the order of Hugging Face transformers.

    That order is repetition penalty, temperature, top-k, top-p, min-p, each on what the one before
    it left. Without arguments it draws from the model's own distribution.

    Raises:
        ValueError: For every value that the filters refuse, now and not at the first token.
    """
    made = Sampler(repetition_penalty, temperature, top_k, top_p, min_p)
    seen = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    jax.eval_shape(made.filtered, jax.ShapeDtypeStruct((1, 2), jnp.float32), seen)
    return made


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The best token, of equals the first; the key is ignored."""

    repetition_penalty: float | None

    def filtered(
        self, logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None = None
    ) -> Float[Array, "*B V"]:
        """Keeps the best token alone.

        Raises:
            ValueError: If there is a repetition penalty and `seen` is None.
        """
        logits = _penalized(logits, seen, self.repetition_penalty)
        best = jnp.argmax(logits, axis=-1)
        return jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), logits, -jnp.inf)

    def __call__(
        self,
        key: Key[Array, ""],
        logits: Float[Array, "B V"],
        seen: Bool[Array, "B V"] | None = None,
    ) -> Int[Array, "B"]:
        """Takes one token a row."""
        return jnp.argmax(_penalized(logits, seen, self.repetition_penalty), axis=-1)


def greedy(*, repetition_penalty: float | None = None) -> Greedy:
    """Makes the sampler that takes the best token: the limit of temperature 0.

    Raises:
        ValueError: If `repetition_penalty` is not a positive finite number.
    """
    made = Greedy(repetition_penalty)
    seen = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    jax.eval_shape(made.filtered, jax.ShapeDtypeStruct((1, 2), jnp.float32), seen)
    return made


def tracks_seen(sample: Sample) -> bool:
    """Whether a sampler needs to be told which tokens a row has seen."""
    return isinstance(sample, Sampler | Greedy) and sample.repetition_penalty is not None


def _penalized(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None, penalty: float | None
) -> Float[Array, "*B V"]:
    logits = logits.astype(jnp.float32)
    if penalty is None:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty={penalty} needs to know the `seen` tokens.")
    return penalize_repetition(logits, seen, penalty)
