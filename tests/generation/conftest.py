"""A model of one attention layer that keeps the contract of generation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Cache(NamedTuple):
    """Keys, which are the values too, of S places, and how many of them each row has filled."""

    keys: jax.Array
    length: jax.Array

    @property
    def max_length(self):
        return self.keys.shape[1]

    def select(self, rows):
        return Cache(self.keys[rows], self.length[rows])

    def rewind(self, lengths):
        return Cache(self.keys, lengths)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Sizes, and the model's functions; parameters are three matrices."""

    vocab_size: int = 11
    width: int = 5
    room: int = 16
    spread: float = 1.5

    def params(self, seed=0):
        shapes = (self.vocab_size, self.width), (self.width, self.width), self.table[::-1]
        keys = jax.random.split(jax.random.key(seed), 3)
        return [self.spread * jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]

    @property
    def table(self):
        return self.vocab_size, self.width

    def empty_cache(self, batch):
        shape = (batch, self.room, self.width)
        return Cache(jnp.zeros(shape), jnp.zeros(batch, jnp.int32))

    def decode(self, params, tokens, cache, counts=None, last=False):
        """The contract; NaN where a row exceeds the room."""
        embed, mix, out = params
        count, room = tokens.shape[1], cache.keys.shape[1]
        counts = jnp.full_like(cache.length, count) if counts is None else counts
        rows, columns = jnp.arange(tokens.shape[0])[:, None], jnp.arange(count)[None]
        places = cache.length[:, None] + columns
        x = embed[tokens] * (1 + jnp.cos(places.astype(jnp.float32)))[..., None]
        target = jnp.where(columns < counts[:, None], places, room)
        keys = cache.keys.at[rows, target].set(x, mode="drop")
        weights = jnp.einsum("btd,de,bse->bts", x, mix, keys)
        hidden = jnp.arange(room)[None, None] > places[..., None]
        weights = jax.nn.softmax(jnp.where(hidden, -jnp.inf, weights), where=~hidden)
        logits = (x + jnp.einsum("bts,bsd->btd", weights, keys)) @ out
        if last:
            logits = jnp.take_along_axis(logits, counts[:, None, None] - 1, axis=1)
        length = cache.length + counts
        return jnp.where(length[:, None, None] > room, jnp.nan, logits), Cache(keys, length)

    def whole(self, params, tokens):
        """Logits after a text, without a cache, in NumPy."""
        embed, mix, out = (np.asarray(part, np.float64) for part in params)
        x = embed[tokens] * (1 + np.cos(np.arange(len(tokens))))[:, None]
        weights = np.exp((scores := x[-1] @ mix @ x.T) - scores.max())
        return (x[-1] + weights @ x / weights.sum()) @ out


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def make_toy():
    """Makes a model of a given vocabulary."""
    return Toy
