"""From integers to vectors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.ops import positions
from jaxformer.typing import Array, Float, Int

_INIT = nn.initializers.normal(0.02)


class Embed(nn.Module):
    """Looks up a learned vector for each token; `logits` uses the same table the other way round.

    Attributes:
        vocab_size: V.
        width: D.
    """

    vocab_size: int
    width: int

    def setup(self) -> None:
        self.table = self.param("table", _INIT, (self.vocab_size, self.width))

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Looks the tokens up; one outside 0..V-1 becomes NaN, which cannot pass unnoticed."""
        tokens = jnp.where(tokens < 0, self.vocab_size, tokens)  # else -1 would mean the last row
        return jnp.take(self.table, tokens, axis=0, mode="fill", fill_value=jnp.nan)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores every token by its vector's product with `x`: a tied output layer."""
        return x @ self.table.T.astype(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position.

    Attributes:
        max_length: Positions in the table.
    """

    max_length: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], offset: int | Int[Array, ""] = 0
    ) -> Float[Array, "B T D"]:
        """Adds the rows from `offset` on; past the end it raises, or gives NaN where traced."""
        table = self.param("table", _INIT, (self.max_length, x.shape[-1]))
        return x + positions.lookup(table, x.shape[1], offset).astype(x.dtype)[None]


class GridPositions(nn.Module):
    """Makes a vector for each patch of a grid, and for tokens before the patches.

    Attributes:
        grid: Patches on each axis, for which learned vectors are made; for others they are
            interpolated.
        width: D.
        learned: Learns the vectors; if not, they are `positions.sinusoidal_grid` of the patches'
            numbers, and zeros for tokens before.
        before: Tokens before the patches.
        antialias: As in `positions.resize_grid`.
    """

    grid: tuple[int, ...]
    width: int
    learned: bool = True
    before: int = 0
    antialias: bool = False

    @nn.compact
    def __call__(self, grid: tuple[int, ...]) -> Float[Array, "rows D"]:
        """Makes the vectors for a grid: first the tokens before, then the patches in order."""
        if not self.learned:
            steps = np.meshgrid(*map(np.arange, grid), indexing="ij")
            numbers = np.stack(steps, axis=-1).reshape(-1, len(grid)).astype(np.float32)
            waves = positions.sinusoidal_grid(jnp.asarray(numbers), self.width)
            return jnp.pad(waves, ((self.before, 0), (0, 0)))
        rows = self.before + math.prod(self.grid)
        table = self.param("table", _INIT, (rows, self.width))
        first, rest = table[: self.before], table[self.before :]
        rest = positions.resize_grid(rest, self.grid, grid, antialias=self.antialias)
        return jnp.concatenate([first, rest])


class RelativeBias(nn.Module):
    """Makes a bias of attention from how far each key is from each query, by learned buckets.

    Attributes:
        num_heads: N.
        num_buckets: E.
        max_distance: From which on all distances are one bucket, in tokens.
        bidirectional: Whether keys ahead have buckets of their own.

    References:
        Raffel et al. 2020, "T5", section 2.1. https://arxiv.org/abs/1910.10683
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    @nn.compact
    def __call__(
        self,
        query_length: int,
        key_length: int,
        offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    ) -> Float[Array, "#B N T S"]:
        """Makes the bias where query t stands at place `offset + t`, in each row alike or not."""
        table = self.param("table", _INIT, (self.num_buckets, self.num_heads))

        def row(offset: int | Array) -> Array:
            buckets = positions.t5_buckets(
                query_length,
                key_length,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
                bidirectional=self.bidirectional,
                offset=offset,
            )
            return positions.bucket_bias(table, buckets)

        return row(offset) if jnp.ndim(offset) == 0 else jax.vmap(row)(offset)[:, 0]


class NeighbourEmbed(nn.Module):
    """Sums learned vectors of the cells around the next one: a causal convolution on tokens.

    Position t of the sequence predicts cell t of a grid read row by row, with a start token before
    cell 0. The embedding there is the sum over `offsets` of one table's row for the token in that
    neighbouring cell; a neighbour outside the grid has a row of its own. What a first layer of
    attention would have to find out, where the cell above is, is thereby given.

    Attributes:
        vocab_size: V, tokens of a cell.
        width: D.
        columns: Cells in a row of the grid.
        offsets: Neighbours as (rows, columns) from the predicted cell, all of them before it.

    References:
        The masked convolution of van den Oord et al. 2016, "Pixel recurrent neural networks",
        section 3.4, as a first layer on one-hot tokens. https://arxiv.org/abs/1601.06759
    """

    vocab_size: int
    width: int
    columns: int
    offsets: tuple[tuple[int, int], ...]

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B S"], first: int | Int[Array, ""] = 0, count: int | None = None
    ) -> Float[Array, "B T D"]:
        """Embeds positions `first` to `first + count` of a sequence whose start token is column 0.

        Args:
            tokens: The whole sequence so far; what comes after the positions asked for is ignored.
                A neighbour outside 0..V-1 becomes NaN, which cannot pass unnoticed.
            first: First position to embed.
            count: T; all of S if None.

        Raises:
            ValueError: If an offset does not lie before the predicted cell.
        """
        for row, column in self.offsets:
            if row > 0 or (row == 0 and column >= 0):
                raise ValueError(f"offset ({row}, {column}) does not lie before the cell.")
        count = tokens.shape[1] if count is None else count
        shape = (len(self.offsets), self.vocab_size + 1, self.width)
        table = self.param("table", _INIT, shape)

        rows, columns = np.array(self.offsets, np.int32).reshape(-1, 2).T
        cell = first + jnp.arange(count)[:, None]
        column = cell % self.columns + columns[None]
        place = cell + (rows * self.columns + columns)[None]  # of the neighbour, among the cells
        known = (place >= 0) & (column >= 0) & (column < self.columns)
        neighbours = jnp.take(tokens, jnp.where(known, place + 1, 0), axis=1)
        unheard = known[None] & ((neighbours < 0) | (neighbours >= self.vocab_size))
        neighbours = jnp.where(known[None], neighbours, self.vocab_size)

        one_hot = jax.nn.one_hot(neighbours, self.vocab_size + 1, dtype=table.dtype)
        flat = one_hot.reshape(tokens.shape[0], count, -1)
        return jnp.where(
            unheard.any(-1, keepdims=True), jnp.nan, flat @ table.reshape(-1, self.width)
        )
