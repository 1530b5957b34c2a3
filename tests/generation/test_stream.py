"""What streams is what `complete` writes, and nothing is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import decode, samplers
from jaxformer.generation.stream import stream

V, P, STEPS = 11, 7, 6
PROMPT = jax.random.randint(jax.random.key(1), (3, P), 0, V)
LENGTHS, LIMITS = jnp.asarray([4, 7, 2]), jnp.asarray([6, 0, 5])
KEYS = jax.random.split(jax.random.key(2), 3)
STOP = (4, (7, 8))
SAMPLE = samplers.sampler(repetition_penalty=1.2, temperature=1.5)


@pytest.fixture(scope="module")
def toy(make_toy):
    return make_toy(V)


def joined(chunks):
    """The new tokens of each row."""
    return [
        [int(token) for chunk in chunks for token in chunk.tokens[row, : chunk.counts[row]]]
        for row in range(3)
    ]


@pytest.fixture(scope="module")
def expected(toy):
    @jax.jit
    def write(params, lengths, limits, key):
        model = jax.tree_util.Partial(toy.decode, params)
        return decode.complete(
            model,
            toy.empty_cache(3),
            PROMPT,
            steps=STEPS,
            sample=SAMPLE,
            key=key,
            prompt_lengths=lengths,
            limits=limits,
            stop=STOP,
        )

    def new(params, lengths, limits, key):
        done = write(params, lengths, limits, key)
        tokens, ends = np.asarray(done.tokens), np.asarray(done.lengths)
        return [tokens[row, lengths[row] : ends[row]].tolist() for row in range(3)]

    return new


def test_the_stream_is_what_complete_writes_and_compiles_once(toy, expected):
    traces = []

    def model(params, tokens, cache, counts, last=False):
        traces.append(tokens.shape)
        return toy.decode(params, tokens, cache, counts, last)

    cache = toy.empty_cache(3)
    for every in (1, 4):
        for seed in range(3):
            changed = (
                toy.params(seed),
                LENGTHS - seed % 2,
                jnp.roll(LIMITS, seed),
                jnp.roll(KEYS, seed),
            )
            params, lengths, limits, key = changed
            chunks = list(
                stream(
                    jax.tree_util.Partial(model, params),
                    cache,
                    PROMPT,
                    steps=STEPS + seed,
                    sample=samplers.sampler(repetition_penalty=1.2, temperature=1.5),
                    key=key,
                    prompt_lengths=lengths,
                    limits=limits,
                    stop=STOP,
                    every=every,
                )
            )
            assert joined(chunks) == expected(*changed)
            widths = [chunk.tokens.shape[1] for chunk in chunks]
            longest = max(map(len, joined(chunks)))
            assert widths == [1] + [every] * -(-(longest - 1) // every)
            if seed == 0:
                compiled = len(traces)
        assert len(traces) == compiled
    assert int(cache.length.sum()) == 0, "the caller's cache is neither changed nor donated"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((cache, changed[:3])))


def test_tokens_come_before_the_text_is_done(toy):
    calls = []

    def watched(tokens, cache, counts, last=True):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((len(tokens), 1, V)), cache

    arguments = {"steps": 5, "sample": samplers.greedy(), "key": KEYS[0]}
    chunks = stream(watched, jnp.zeros(()), PROMPT, prompt_lengths=LENGTHS, **arguments)
    assert not calls
    for expected in range(1, 6):
        assert next(chunks).counts.tolist() == [1, 1, 1]
        jax.effects_barrier()
        assert len(calls) == expected
    assert next(chunks, None) is None


def test_text_is_streamed_through_a_tokenizer():
    from jaxformer.tokenizers import plain

    tokenizer = plain.Bytes()
    text = "né, 蛋!"
    script = jnp.asarray([tokenizer.encode(text)])

    def recite(tokens, cache):
        place = cache + tokens.shape[1]
        following = jax.nn.one_hot(script[:, place - 1], 256)
        return following[:, None], place

    chunks = stream(
        recite,
        jnp.asarray(0),
        jnp.zeros((1, 1), int),
        steps=script.shape[1],
        sample=samplers.greedy(),
        key=KEYS[0],
        every=3,
    )
    ids = (int(token) for chunk in chunks for token in chunk.tokens[0, : chunk.counts[0]])
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text
    assert "蛋" in pieces


def test_bad_arguments_are_refused_at_the_call(toy):
    arguments = {"steps": 2, "sample": samplers.greedy(), "key": KEYS[0]}
    for changed, match in (({"every": 0}, "every=0"), ({"steps": -1}, "steps=-1")):
        with pytest.raises(ValueError, match=match):
            stream(toy.decode, toy.empty_cache(3), PROMPT, **arguments | changed)
    none = stream(toy.decode, toy.empty_cache(3), PROMPT, **arguments | {"steps": 0})
    assert list(none) == []
