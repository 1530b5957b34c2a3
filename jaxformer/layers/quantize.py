"""Quantisers: layers that turn vectors into codes of a finite set, and codes into vectors.

All are called with vectors of any width, which a linear map brings to what is quantised, and give
a `Quantized`. `lookup` gives the vectors of ids, and `vocab_size` is E. A random key is needed in
training where a layer draws: the rng is named "quantizer".
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxformer.layers.linear import Dense
from jaxformer.ops import codebook
from jaxformer.typing import Array, Float, Int

_INIT = nn.initializers.normal(1.0)


class Quantized(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes:
        vectors: Of the codes, with the gradient that the quantiser gives them.
        ids: Of the codes; the likeliest where `vectors` are of a draw, or mixed.
        loss: To be added to the model's, weighted already.
    """

    vectors: Float[Array, "*B D"]
    ids: Int[Array, "*B"]
    loss: Float[Array, ""]


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of E codes, which are trained by gradients.

    Attributes:
        num_codes: E.
        width: D, of the codes.
        commitment: β, the weight of the commitment loss.

    References:
        van den Oord et al. 2017, "Neural discrete representation learning", eq. 3.
        https://arxiv.org/abs/1711.00937
    """

    num_codes: int
    width: int
    commitment: float = 0.25

    def setup(self) -> None:
        self.into = Dense(self.width, use_bias=True)
        self.codes = self.param("codes", _INIT, (self.num_codes, self.width))

    @property
    def vocab_size(self) -> int:
        """E."""
        return self.num_codes

    def __call__(self, x: Float[Array, "*B I"], train: bool = False) -> Quantized:
        """Quantises; training makes no difference."""
        z = self.into(x)
        ids = codebook.nearest(z, self.codes)
        vectors = self.lookup(ids)
        loss = codebook.codebook_loss(z, vectors)
        loss = loss + self.commitment * codebook.commitment_loss(z, vectors)
        return Quantized(codebook.straight_through(z, vectors), ids, loss)

    def lookup(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The codes of ids."""
        return self.codes[ids]


class EMAVectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of E codes, which follow the vectors that chose them.

    The moving averages that make the codes lie in the collection "codebook", no parameters among
    them: it must be mutable in training. They are linear in the rows of a batch, as `TrainState`
    asks of its `extra`, but for codes that are revived: under `pmap`, or where gradients are
    accumulated, each part of a batch revives them by itself, and the mean of these is a poor start;
    there `revive_below=0` is better.

    Attributes:
        num_codes: E.
        width: D, of the codes.
        commitment: β, the weight of the commitment loss.
        decay: Share of the averages that stays at each step.
        revive_below: Share of the mean use below which a code is put on a random vector; 0 for
            never.

    References:
        van den Oord et al. 2017, appendix A.1.
    """

    num_codes: int
    width: int
    commitment: float = 0.25
    decay: float = 0.99
    revive_below: float = 0.1

    def setup(self) -> None:
        self.into = Dense(self.width, use_bias=True)

        def start() -> dict[str, Array]:
            codes = _INIT(self.make_rng("params"), (self.num_codes, self.width))
            return codebook.start_averages(codes)._asdict()

        self.averages = self.variable("codebook", "averages", start)

    @property
    def vocab_size(self) -> int:
        """E."""
        return self.num_codes

    def __call__(self, x: Float[Array, "*B I"], train: bool = False) -> Quantized:
        """Quantises with the codes of before; in training the averages then take a step."""
        z = self.into(x)
        averages = codebook.Averages(**self.averages.value)
        codes = codebook.averaged_codes(averages)
        ids = codebook.nearest(z, codes)
        if train and not self.is_initializing():
            if self.revive_below:
                key = self.make_rng("quantizer")
                averages = codebook.revive_averages(averages, z, key, self.revive_below)
            averages = codebook.update_averages(averages, z, ids, self.decay)
            self.averages.value = averages._asdict()
        loss = self.commitment * codebook.commitment_loss(z, codes[ids])
        return Quantized(codebook.straight_through(z, codes[ids]), ids, loss)

    def lookup(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The codes of ids."""
        return codebook.averaged_codes(codebook.Averages(**self.averages.value))[ids]


class FSQ(nn.Module):
    """Rounds each of a few bounded channels: a grid of codes without parameters or losses.

    Attributes:
        levels: Of each channel; their product is E. The paper has (8, 6, 5) for about 2**8 codes,
            (8, 5, 5, 5) for 2**10 and (7, 5, 5, 5, 5) for 2**12.

    References:
        Mentzer et al. 2023, "Finite scalar quantization". https://arxiv.org/abs/2309.15505
    """

    levels: tuple[int, ...]

    def setup(self) -> None:
        self.into = Dense(len(self.levels), use_bias=True)

    @property
    def vocab_size(self) -> int:
        """E."""
        return math.prod(self.levels)

    def __call__(self, x: Float[Array, "*B I"], train: bool = False) -> Quantized:
        """Quantises; training makes no difference."""
        z = self.into(x)
        vectors = codebook.fsq_quantize(z.astype(jnp.float32), self.levels)
        ids = codebook.fsq_ids(vectors, self.levels)
        return Quantized(vectors.astype(z.dtype), ids, jnp.zeros(()))

    def lookup(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The codes of ids."""
        return codebook.fsq_codes(ids, self.levels)


class GumbelQuantizer(nn.Module):
    """Draws one of E codes by a relaxed softmax in training; takes the likeliest otherwise.

    Attributes:
        num_codes: E.
        width: D, of the codes.
        divergence: Weight of the divergence from a uniform choice, in nats a vector.

    References:
        Ramesh et al. 2021, "Zero-shot text-to-image generation", section 2.1 and appendix A.2.
        https://arxiv.org/abs/2102.12092
    """

    num_codes: int
    width: int
    divergence: float = 0.0

    def setup(self) -> None:
        self.into = Dense(self.num_codes, use_bias=True)
        self.codes = self.param("codes", _INIT, (self.num_codes, self.width))

    @property
    def vocab_size(self) -> int:
        """E."""
        return self.num_codes

    def __call__(
        self,
        x: Float[Array, "*B I"],
        train: bool = False,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> Quantized:
        """Quantises; in training the vectors are mixed, the less the lower the temperature is."""
        logits = self.into(x)
        key = self.make_rng("quantizer") if train else None
        weights = codebook.gumbel_weights(logits, temperature if train else 0.0, key)
        vectors = weights @ self.codes.astype(x.dtype)
        loss = self.divergence * codebook.kl_to_uniform(logits).mean()
        return Quantized(vectors, logits.argmax(axis=-1).astype(jnp.int32), loss)

    def lookup(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The codes of ids."""
        return self.codes[ids]
