"""The cached loop writes what a loop without a cache writes, whatever the prompts' lengths."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import decode, samplers

V, P, STEPS, PAD = 11, 7, 6, 9
PROMPT = np.asarray(jax.random.randint(jax.random.key(1), (3, P), 0, V))
LENGTHS = np.asarray([4, 7, 2], np.int32)
KEY = jax.random.key(2)
KEYS = jax.random.split(KEY, 3)
NO_LIMITS = np.full(3, STEPS, np.int32)
GREEDY, RANDOM = samplers.greedy(), samplers.sampler(temperature=1.5)
PENALIZED = samplers.sampler(repetition_penalty=1.7, top_k=5)


@pytest.fixture(scope="module")
def toy(make_toy):
    return make_toy(V)


@pytest.fixture(scope="module")
def params(toy):
    return toy.params()


@pytest.fixture(scope="module")
def write(toy, params):
    """`complete` with the toy, compiled once for each set of static arguments."""

    @functools.partial(jax.jit, static_argnames=("steps", "sample", "stop"))
    def compiled(prompt, lengths, limits, key, **static):
        model = functools.partial(toy.decode, params)
        cache = toy.empty_cache(prompt.shape[0])
        return decode.complete(
            model, cache, prompt, key=key, prompt_lengths=lengths, limits=limits, pad=PAD, **static
        )

    def call(sample, prompt=PROMPT, lengths=None, limits=NO_LIMITS, key=KEY, **static):
        static = {"steps": STEPS, "sample": sample, "stop": ()} | static
        done = compiled(prompt, lengths, limits[: len(prompt)], key, **static)
        return decode.Completion(*jax.device_get(done[:3]), done.cache)

    return call


@pytest.fixture(scope="module")
def naive(toy, params):
    """Row `which` of three, the whole text through the model for each token; and the scores."""
    draw = {sample: jax.jit(sample) for sample in (GREEDY, RANDOM, PENALIZED)}

    def written(row, length, sample, *, which, key=KEY, offset=None, steps=STEPS):
        tokens, scores = np.asarray(row)[:length].tolist(), []
        for step in range(steps):
            logits = toy.whole(params, tokens).astype(np.float32)
            seen = np.isin(np.arange(V), tokens)
            state = (logits, seen) if samplers.tracks_seen(sample) else (logits,)
            position = (length if offset is None else offset) + step
            batch = 3 if key.ndim == 0 else 1
            state = [np.tile(part, (batch, 1)) for part in state]
            one = key if key.ndim == 0 else key[which]
            drawn = draw[sample](jax.random.fold_in(one, position), *state)
            tokens.append(int(drawn[which if key.ndim == 0 else 0]))
            scores.append(logits[tokens[-1]] - np.log(np.exp(logits).sum()))
        return tokens, scores

    return written


@pytest.mark.parametrize(
    ("sample", "key", "offset"),
    [(GREEDY, KEY, P), (RANDOM, KEY, P), (RANDOM, KEYS, None), (PENALIZED, KEYS, None)],
    ids=["greedy", "one key", "a key a row", "seen tokens"],
)
def test_prompts_of_different_lengths_continue_as_if_alone(write, naive, sample, key, offset):
    done = write(sample, lengths=LENGTHS, key=key)
    np.testing.assert_array_equal(done.lengths, LENGTHS + STEPS)
    for row, length in enumerate(LENGTHS.tolist()):
        tokens, scores = naive(PROMPT[row], length, sample, which=row, key=key, offset=offset)
        np.testing.assert_array_equal(done.tokens[row], tokens + [PAD] * (P - length))
        np.testing.assert_allclose(done.log_probs[row], scores, atol=1e-4)


def test_prompts_of_one_length_need_no_lengths(write, naive):
    done = write(RANDOM)
    for row in range(3):
        np.testing.assert_array_equal(done.tokens[row], naive(PROMPT[row], P, RANDOM, which=row)[0])
    np.testing.assert_array_equal(
        done.tokens, write(RANDOM, lengths=np.full(3, P, np.int32)).tokens
    )
    assert done.tokens.dtype == PROMPT.dtype
    assert done.tokens.shape == (3, P + STEPS)


def test_with_a_key_a_row_neither_the_batch_nor_the_padding_matters(write):
    whole = write(RANDOM, lengths=LENGTHS, key=KEYS)
    order = np.asarray([2, 0])
    longer = np.pad(PROMPT, ((0, 0), (0, 3)), constant_values=5)[order]
    part = write(RANDOM, longer, LENGTHS[order], key=KEYS[order])
    np.testing.assert_array_equal(part.tokens[:, : P + STEPS], whole.tokens[order])


def test_what_stands_in_the_padding_of_a_prompt_changes_nothing(write):
    inside = np.arange(P)[None] < LENGTHS[:, None]
    other = np.where(inside, PROMPT, V - 1 - PROMPT)
    given = {"lengths": LENGTHS, "key": KEYS}
    for sample in (RANDOM, PENALIZED):
        chex.assert_trees_all_equal(write(sample, **given)[:3], write(sample, other, **given)[:3])


def test_a_row_ends_with_its_first_stop_and_padding_follows(write):
    free = write(RANDOM, lengths=LENGTHS, key=KEYS)
    new = [free.tokens[row, length:][:STEPS].tolist() for row, length in enumerate(LENGTHS)]
    stop = (new[0][2], (new[1][1], new[1][2]), (new[2][3], new[2][3] + 1))
    assert new[0][2] not in new[0][:2]
    done = write(RANDOM, lengths=LENGTHS, key=KEYS, stop=stop)
    ends = []
    for row, length in enumerate(LENGTHS.tolist()):
        text, end = new[row], STEPS
        for place in range(STEPS, 0, -1):
            if text[place - 1] == stop[0] or tuple(text[:place][-2:]) in stop[1:]:
                end = place
        ends.append(end)
        expected = PROMPT[row, :length].tolist() + text[:end]
        expected += [PAD] * (P + STEPS - len(expected))
        np.testing.assert_array_equal(done.tokens[row], expected)
        assert (done.log_probs[row, end:] == 0).all()
        assert (done.log_probs[row, :end] == free.log_probs[row, :end]).all()
    np.testing.assert_array_equal(done.lengths, LENGTHS + np.asarray(ends))
    np.testing.assert_array_equal(done.cache.length, done.lengths - 1)
    assert ends[0] == 3
    assert ends[1] <= 3


def test_a_stop_inside_a_prompt_or_across_its_end_ends_nothing(write):
    free = write(GREEDY)
    first = int(free.tokens[0, P])
    prompt_end = (int(PROMPT[0, -1]), first)
    inside = tuple(PROMPT[0, 2:4].tolist())
    fresh = {tuple(pair) for pair in zip(free.tokens[0, P:-1].tolist(), free.tokens[0, P + 1 :])}
    assert not fresh & {prompt_end, inside}
    done = write(GREEDY, stop=(prompt_end, inside))
    np.testing.assert_array_equal(done.tokens[0], free.tokens[0])


def test_each_row_keeps_to_its_limit(write):
    free = write(RANDOM, lengths=LENGTHS, key=KEYS)
    limits = np.asarray([0, STEPS + 3, 2], np.int32)
    done = write(RANDOM, lengths=LENGTHS, limits=limits, key=KEYS)
    drawn = np.minimum(limits, STEPS)
    np.testing.assert_array_equal(done.lengths, LENGTHS + drawn)
    for row in range(3):
        end = int(done.lengths[row])
        np.testing.assert_array_equal(done.tokens[row, :end], free.tokens[row, :end])
        assert (done.tokens[row, end:] == PAD).all()


def test_the_cache_goes_on_with_the_next_turn(toy, params, write):
    stop = int(write(GREEDY, lengths=LENGTHS).tokens[0, LENGTHS[0] + 1])
    turn = write(GREEDY, lengths=LENGTHS, stop=stop)
    last = np.take_along_axis(turn.tokens, turn.lengths[:, None] - 1, axis=1)

    @jax.jit
    def go_on(cache, last):
        model = functools.partial(toy.decode, params)
        return decode.generate(model, cache, last, steps=2, sample=GREEDY, key=KEY)

    more = np.asarray(go_on(turn.cache, last))
    for row, length in enumerate(turn.lengths.tolist()):
        text = turn.tokens[row, :length].tolist()
        for _ in range(2):
            text.append(int(toy.whole(params, text).argmax()))
        np.testing.assert_array_equal(more[row, 1:], text[-2:])


def equal_positions(toy, params):
    """The model without counts, its position one number: rows cannot be apart."""

    def model(tokens, cache, last=False):
        keys, position = cache
        rows = jnp.full(tokens.shape[0], position)
        cache = toy.empty_cache(1)._replace(keys=keys, length=rows)
        logits, new = toy.decode(params, tokens, cache, last=last)
        return logits, (new.keys, position + tokens.shape[1])

    return model


def test_a_model_without_counts_or_lengths_serves_equal_prompts(toy, params, write):
    @jax.jit
    def alike(prompt):
        model = equal_positions(toy, params)
        cache = (toy.empty_cache(3).keys, jnp.asarray(0))
        rest = {"steps": STEPS, "sample": RANDOM, "key": KEY, "stop": 4, "pad": PAD}
        return decode.generate(model, cache, prompt, **rest)

    tokens = alike(PROMPT)
    np.testing.assert_array_equal(tokens, write(RANDOM, stop=4).tokens)
    assert (np.asarray(tokens)[:, P:] == 4).any()


def test_the_loop_ends_when_every_row_has():
    calls = []

    def watched(tokens, calls_so_far, last=True):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((len(tokens), 1, V)).at[..., 4].set(1.0), calls_so_far + 1

    def run(**arguments):
        calls.clear()
        arguments = {"steps": 50, "sample": GREEDY, "key": KEY} | arguments
        write = functools.partial(decode.generate, watched, jnp.asarray(0), **arguments)
        tokens = jax.device_get(jax.jit(write)(PROMPT))
        jax.effects_barrier()
        return tokens, len(calls)

    tokens, count = run(stop=4)
    assert count == 1, "one call for the prompt; the first token drawn stops every row"
    assert (tokens[:, P] == 4).all()
    assert (tokens[:, P + 1 :] == 0).all()
    assert run(stop=(4, 4))[1] == 1
    assert run(stop=((4, 4, 4),))[1] == 3
    assert run(limits=jnp.asarray([2, 5, 1]))[1] == 5


def test_the_model_is_called_once_less_than_there_are_columns(toy, params):
    fed = []

    def watched(tokens, cache, **options):
        jax.debug.callback(lambda length: fed.append(int(length[0])), cache.length)
        return toy.decode(params, tokens, cache, **options)

    @jax.jit
    def run(prompt):
        cache = toy.empty_cache(3)
        return decode.generate(watched, cache, prompt, steps=STEPS, sample=GREEDY, key=KEY)

    run(PROMPT)
    jax.effects_barrier()
    assert sorted(fed) == [0, *range(P, P + STEPS - 1)]  # room for P + steps - 1 is enough


def test_keys_decide_the_draws(write):
    first = write(RANDOM).tokens
    np.testing.assert_array_equal(first, write(RANDOM).tokens)
    assert (first != write(RANDOM, key=jax.random.key(3)).tokens).any()
    same = write(RANDOM, np.tile(PROMPT[:1], (3, 1)))
    assert len({tuple(row) for row in same.tokens[:, P:]}) == 3


def test_other_lengths_limits_keys_prompts_and_parameters_compile_nothing(toy, params):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def write(params, prompt, lengths, limits, key):
        model = functools.partial(toy.decode, params)
        return decode.complete(
            model,
            toy.empty_cache(3),
            prompt,
            steps=STEPS,
            sample=samplers.sampler(top_k=3),
            key=key,
            prompt_lengths=lengths,
            limits=limits,
            stop=(4, (5, 6)),
        )

    for seed in range(3):
        more = [part + seed for part in params]
        write(more, PROMPT + seed, LENGTHS - seed % 2, LENGTHS + seed, jax.random.key(seed))


def test_the_program_does_not_grow_with_the_number_of_steps(toy, params):
    long = toy.empty_cache(3)
    long = long._replace(keys=jnp.zeros((3, 600, toy.width)))

    def size(steps):
        def write(prompt):
            model = functools.partial(toy.decode, params)
            return decode.generate(model, long, prompt, steps=steps, sample=RANDOM, key=KEY)

        return len(jax.jit(write).lower(PROMPT).as_text().splitlines())

    assert size(5) == size(500)


def test_zero_steps_return_the_prompt_padded(write):
    done = write(GREEDY, lengths=LENGTHS, steps=0)
    inside = np.arange(P)[None] < np.asarray(LENGTHS)[:, None]
    np.testing.assert_array_equal(done.tokens, np.where(inside, PROMPT, PAD))
    np.testing.assert_array_equal(done.lengths, LENGTHS)


def test_arguments_out_of_range_are_named_in_the_error(toy, params):
    def call(prompt=PROMPT, **arguments):
        decode.generate(
            functools.partial(toy.decode, params),
            toy.empty_cache(3),
            jnp.asarray(prompt),
            **{"steps": 2, "sample": GREEDY, "key": KEY} | arguments,
        )

    for arguments, match in (
        ({"steps": -1}, "steps=-1"),
        ({"prompt": PROMPT[:, :0]}, "P=0"),
        ({"prompt_lengths": jnp.asarray([4, 0, 2])}, r"prompt_lengths\[1\]=0"),
        ({"prompt_lengths": jnp.asarray([4, 8, 2])}, r"prompt_lengths\[1\]=8 .* P=7"),
        ({"limits": jnp.asarray([4, 0, -2])}, r"limits\[2\]=-2"),
        ({"stop": ((3, 4), ())}, "no tokens"),
        ({"prompt": np.tile(PROMPT, (1, 3))}, "need 22 places; the cache has room for 16"),
        ({"steps": 11}, "need 17 places; the cache has room for 16"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**arguments)
    fits = {"steps": 10}, {"steps": 99, "limits": jnp.asarray([10, 2, 1])}
    for arguments in fits:
        jax.eval_shape(functools.partial(call, **arguments))
    jax.eval_shape(lambda lengths: call(steps=99, prompt_lengths=lengths), LENGTHS)  # unknown
