"""The cached loop writes what a loop without a cache writes, whatever the prompts' lengths."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import decode, samplers

V, D, P, STEPS = 11, 5, 7, 6
TABLES = jax.random.normal(jax.random.key(0), (2, V, D))
PROMPT = jax.random.randint(jax.random.key(1), (3, P), 0, V)
LENGTHS = jnp.asarray([4, 7, 2])
KEY = jax.random.key(2)
GREEDY, RANDOM = samplers.greedy(), samplers.sampler(temperature=1.5)
DRAW = {sample: jax.jit(sample) for sample in (GREEDY, RANDOM)}


def logits_after(tokens):
    """A causal model: the logits after a row from the sum of its tokens, weighted by position."""
    embed, unembed = np.asarray(TABLES)
    return 2 * np.cos(np.arange(len(tokens))) @ embed[tokens] @ unembed.T


def decode_with_cache(tokens, cache):
    """The same model, a piece at a time; the cache is the sum so far and the position."""
    total, position = cache
    steps = position + jnp.arange(tokens.shape[1])
    weights = jnp.cos(steps.astype(jnp.float32))[None, :, None]
    sums = total[:, None] + jnp.cumsum(weights * TABLES[0][tokens], axis=1)
    return 2 * sums @ TABLES[1].T, (sums[:, -1], position + tokens.shape[1])


def empty_cache(batch):
    return jnp.zeros((batch, D)), jnp.asarray(0)


def naive(row, length, sample, *, which, stop=None, pad=0):
    """Row `which` of three on its own, the whole sequence through the model for each token."""
    tokens = np.asarray(row)[:length].tolist()
    for position in range(length, length + STEPS):
        everyone = np.tile(logits_after(tokens).astype(np.float32), (3, 1))
        tokens.append(int(DRAW[sample](jax.random.fold_in(KEY, position), everyone)[which]))
        if tokens[-1] == stop:
            break
    return tokens + [pad] * (P + STEPS - len(tokens))


def written(sample, prompt=PROMPT, lengths=None, **arguments):
    @jax.jit
    def write(prompt, lengths, key):
        return decode.generate(
            decode_with_cache,
            empty_cache(prompt.shape[0]),
            prompt,
            sample=sample,
            key=key,
            prompt_lengths=lengths,
            **{"steps": STEPS} | arguments,
        )

    return np.asarray(write(prompt, lengths, KEY))


@pytest.mark.parametrize("sample", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_prompts_of_different_lengths_continue_as_if_alone(sample):
    expected = [naive(PROMPT[row], int(LENGTHS[row]), sample, pad=9, which=row) for row in range(3)]
    np.testing.assert_array_equal(written(sample, lengths=LENGTHS, pad=9), expected)
    np.testing.assert_array_equal(written(sample, lengths=LENGTHS, pad=9, prefix=2), expected)


def test_prompts_of_one_length_need_no_lengths():
    expected = [naive(PROMPT[row], P, RANDOM, which=row) for row in range(3)]
    tokens = written(RANDOM)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(written(RANDOM, prefix=1), tokens)
    assert tokens.dtype == PROMPT.dtype
    assert tokens.shape == (3, P + STEPS)


def test_what_stands_in_the_padding_of_a_prompt_changes_nothing():
    inside = jnp.arange(P)[None] < LENGTHS[:, None]
    other = jnp.where(inside, PROMPT, V - 1 - PROMPT)
    np.testing.assert_array_equal(
        written(RANDOM, lengths=LENGTHS), written(RANDOM, other, lengths=LENGTHS)
    )


def test_a_row_ends_with_its_first_new_stop_and_padding_follows():
    free = written(GREEDY, lengths=LENGTHS)
    stop = int(free[0, LENGTHS[0] + 2])  # the third new token of the first row
    tokens = written(GREEDY, PROMPT, LENGTHS, stop=stop, pad=V - 1)
    for row in range(3):
        expected = naive(PROMPT[row], int(LENGTHS[row]), GREEDY, which=row, stop=stop, pad=V - 1)
        np.testing.assert_array_equal(tokens[row], expected)
    assert stop in tokens[0, : LENGTHS[0] + 3]
    assert (tokens[0, LENGTHS[0] + 3 :] == V - 1).all()


def test_a_stop_inside_a_prompt_ends_nothing():
    stop = int(written(GREEDY)[0, -1])
    prompt = PROMPT.at[0, 3].set(stop)
    expected = naive(prompt[0], P, GREEDY, which=0, stop=stop)
    tokens = written(GREEDY, prompt, LENGTHS.at[0].set(P), stop=stop, prefix=1)
    np.testing.assert_array_equal(tokens[0], expected)


def test_the_loop_ends_when_every_row_has():
    def counting(tokens, calls):
        return jnp.zeros((*tokens.shape, V)).at[..., 4].set(1.0), calls + 1

    calls = []

    def watched(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return counting(tokens, cache)

    tokens = decode.generate(
        watched, jnp.asarray(0), PROMPT, steps=50, sample=GREEDY, key=KEY, stop=4
    )
    jax.effects_barrier()
    assert len(calls) == 1, "one call for the prompt; the first token drawn stops every row"
    assert (tokens[:, P] == 4).all()
    assert (tokens[:, P + 1 :] == 0).all()


def test_the_model_is_called_once_less_than_there_are_columns():
    fed = []

    def watched(tokens, cache):
        jax.debug.callback(lambda position: fed.append(int(position)), cache[1])
        return decode_with_cache(tokens, cache)

    decode.generate(watched, empty_cache(3), PROMPT, steps=STEPS, sample=GREEDY, key=KEY)
    jax.effects_barrier()
    assert sorted(fed) == [0, *range(P, P + STEPS - 1)]  # room for P + steps - 1 is enough


def test_keys_decide_the_draws():
    write = jax.jit(
        lambda key: decode.generate(
            decode_with_cache, empty_cache(3), PROMPT, steps=STEPS, sample=RANDOM, key=key
        )
    )
    first = write(KEY)
    np.testing.assert_array_equal(first, write(KEY))
    assert (first != write(jax.random.key(3))).any()
    assert len({tuple(row) for row in np.asarray(write(KEY))[:, P:]}) == 3


def test_a_compiled_loop_is_traced_once():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def write(tables, prompt, lengths, key):
        def model(tokens, cache):
            logits, cache = decode_with_cache(tokens, cache)
            return logits + tables.sum(), cache

        return decode.generate(
            model,
            empty_cache(3),
            prompt,
            steps=STEPS,
            sample=samplers.sampler(top_k=3),
            key=key,
            prompt_lengths=lengths,
        )

    for seed in range(3):
        write(TABLES + seed, PROMPT + seed, LENGTHS - seed % 2, jax.random.key(seed))


def test_the_program_does_not_grow_with_the_number_of_steps():
    def size(steps):
        lowered = jax.jit(
            lambda prompt: decode.generate(
                decode_with_cache, empty_cache(3), prompt, steps=steps, sample=RANDOM, key=KEY
            )
        ).lower(PROMPT)
        return len(lowered.as_text().splitlines())

    assert size(5) == size(500)


def test_zero_steps_return_the_prompt_padded():
    tokens = written(GREEDY, lengths=LENGTHS, steps=0, pad=8)
    inside = np.arange(P)[None] < np.asarray(LENGTHS)[:, None]
    np.testing.assert_array_equal(tokens, np.where(inside, PROMPT, 8))


def test_arguments_out_of_range_are_named_in_the_error():
    def call(prompt=PROMPT, **arguments):
        decode.generate(
            decode_with_cache,
            empty_cache(3),
            prompt,
            **{"steps": 2, "sample": GREEDY, "key": KEY} | arguments,
        )

    for arguments, match in (
        ({"steps": -1}, "steps=-1"),
        ({"prompt": PROMPT[:, :0]}, "P=0"),
        ({"prefix": 0}, "prefix=0"),
        ({"prefix": 8}, "P=7, got prefix=8"),
        ({"prompt_lengths": jnp.asarray([4, 0, 2])}, r"prompt_lengths\[1\]=0"),
        ({"prompt_lengths": jnp.asarray([4, 8, 2])}, r"prompt_lengths\[1\]=8"),
        ({"prompt_lengths": LENGTHS, "prefix": 3}, r"prompt_lengths\[2\]=2 .* prefix=3"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**arguments)
