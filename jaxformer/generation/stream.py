"""Writing token by token, and handing over each as soon as it is there."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxformer.generation import loop, stops
from jaxformer.generation.loop import Cache, Decode
from jaxformer.generation.samplers import Sample
from jaxformer.generation.stops import Stop
from jaxformer.typing import Array, Int, Key


class Chunk(NamedTuple):
    """New tokens of every row, on the host.

    Attributes:
        tokens: Of row b the first `counts[b]` are new, the rest is `pad`.
        counts: New tokens of each row; 0 once it has ended.
    """

    tokens: Int[np.ndarray, "B N"]
    counts: Int[np.ndarray, "B"]


def stream(
    decode: Decode,
    cache: Cache,
    prompt: Int[Array, "B P"],
    *,
    steps: int,
    sample: Sample,
    key: Key[Array, ""] | Key[Array, "B"],
    prompt_lengths: Int[Array, "B"] | None = None,
    limits: Int[Array, "B"] | None = None,
    stop: Stop = None,
    pad: int = 0,
    every: int = 1,
) -> Iterator[Chunk]:
    """Yields the new tokens of `decode.complete`, the same ones, as they are drawn.

    The first chunk has one token a row, the others up to `every`, which go out in one dispatch.
    A function that joins them to a tokenizer's incremental decoder, for one row:

        def text(tokenizer, chunks, row=0):
            return tokenizer.decode_stream(
                token for chunk in chunks for token in chunk.tokens[row, : chunk.counts[row]]
            )

        write = jax.tree_util.Partial(model.apply, params)
        for piece in text(tokenizer, stream(write, cache, prompt, ...)):
            print(piece, end="", flush=True)

    Compiles once for each `decode` function, shape, sampler, stop and `every`; other parameters,
    lengths, limits, `steps` and keys compile nothing. So `decode` must be the same function at each
    call, and parameters that it closes over would be compiled in: bind them with
    `jax.tree_util.Partial`, as above. The cache that is handed in stays valid.

    Args:
        decode: As for `decode.complete`.
        cache: As for `decode.complete`.
        prompt: As for `decode.complete`.
        steps: The most new tokens a row can have, 0 or more.
        sample: As for `decode.complete`; hashable, and equal where it draws alike.
        key: As for `decode.complete`.
        prompt_lengths: As for `decode.complete`.
        limits: As for `decode.complete`.
        stop: As for `decode.complete`.
        pad: As for `decode.complete`.
        every: Tokens a dispatch, 1 or more.

    Raises:
        ValueError: As `decode.complete`, at the call, or if `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"a dispatch needs every >= 1, got {every=}.")
    lengths, left = loop.prepare((cache,), prompt, prompt_lengths, steps, limits)
    rules = loop.Rules(sample, stops.sequences(stop), pad, ragged=prompt_lengths is not None)
    if not isinstance(decode, jax.tree_util.Partial):
        decode = jax.tree_util.Partial(decode)

    def chunks() -> Iterator[Chunk]:
        if steps == 0:
            return
        state, tokens = _start(decode, cache, prompt, lengths, left, key, rules)
        before = np.zeros(prompt.shape[0], np.int32)
        while True:
            drawn, left_now = jax.device_get((state.drawn, state.left))
            yield Chunk(np.asarray(tokens), drawn - before)
            if not left_now.any():
                return
            before = drawn
            state, tokens = _more(decode, state, every, rules)

    return chunks()


@functools.partial(jax.jit, static_argnames=("rules",))
def _start(
    decode: Decode,
    cache: Cache,
    prompt: Array,
    lengths: Array,
    left: Array,
    key: Array,
    rules: loop.Rules,
) -> tuple[loop.State, Array]:
    state, tokens, _ = loop.start(decode, cache, prompt, lengths, left, key, rules)
    return state, tokens[:, None]


@functools.partial(jax.jit, static_argnames=("every", "rules"), donate_argnames=("state",))
def _more(
    decode: Decode, state: loop.State, every: int, rules: loop.Rules
) -> tuple[loop.State, Array]:
    state, tokens, _ = loop.run(decode, state, every, rules)
    return state, tokens
