"""Beams are those of transformers, and with enough of them the best of all texts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import decode, samplers
from jaxformer.generation.beam import beam_search

V, P, STEPS = 7, 5, 4
PROMPT = jax.random.randint(jax.random.key(1), (3, P), 0, V)
LENGTHS = jnp.asarray([2, 5, 3])


@pytest.fixture(scope="module")
def toy(make_toy):
    return make_toy(V)


@pytest.fixture(scope="module")
def params(toy):
    return toy.params()


@functools.partial(
    jax.jit, static_argnames=("toy", "steps", "num_beams", "length_penalty", "stop", "pad")
)
def compiled(toy, params, prompt, lengths, **static):
    model = functools.partial(toy.decode, params)
    cache = toy.empty_cache(prompt.shape[0])
    return beam_search(model, cache, prompt, prompt_lengths=lengths, **static)


def search(toy, params, prompt=PROMPT, lengths=LENGTHS, **static):
    static = {"steps": STEPS, "num_beams": 3} | static
    return jax.device_get(compiled(toy, params, prompt, lengths, **static))


def score(toy, params, prompt, new):
    """Sum of the log-probabilities of what follows a prompt."""
    total = 0.0
    for place in range(len(new)):
        logits = toy.whole(params, np.asarray([*prompt, *new[:place]], int))
        total += logits[new[place]] - np.log(np.exp(logits).sum())
    return total


def test_enough_beams_find_the_best_of_all_texts(toy, params):
    """With a stop, and lengths that count: all texts of up to three tokens are scored."""
    stop, steps, penalty = 2, 3, 0.6
    done = search(
        toy, params, steps=steps, num_beams=V**2, length_penalty=penalty, stop=stop, pad=6
    )
    for row in range(2):
        prompt = PROMPT[row, : LENGTHS[row]].tolist()
        every = {}
        for text in itertools.product(range(V), repeat=steps):
            new = text[: text.index(stop) + 1] if stop in text else text
            if new not in every:
                every[new] = score(toy, params, prompt, new) / len(new) ** penalty
        best = sorted(every.items(), key=lambda item: -item[1])[:5]
        np.testing.assert_allclose(done.scores[row, :5], [value for _, value in best], rtol=1e-4)
        for beam, (new, _) in enumerate(best):
            expected = prompt + list(new)
            assert done.lengths[row, beam] == len(expected)
            expected += [6] * (P + steps - len(expected))
            np.testing.assert_array_equal(done.tokens[row, beam], expected)


def test_one_beam_is_greedy(toy, params):
    done = search(toy, params, num_beams=1, stop=3)

    @jax.jit
    def write(prompt):
        model, rest = functools.partial(toy.decode, params), {"steps": STEPS, "stop": 3}
        rest |= {"sample": samplers.greedy(), "key": jax.random.key(0), "prompt_lengths": LENGTHS}
        return decode.complete(model, toy.empty_cache(3), prompt, **rest)

    greedy = jax.device_get(write(PROMPT))
    np.testing.assert_array_equal(done.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(done.lengths[:, 0], greedy.lengths)
    mean = greedy.log_probs.sum(1) / (greedy.lengths - LENGTHS)
    np.testing.assert_allclose(done.scores[:, 0], mean, rtol=1e-5)


def test_rows_of_a_batch_do_not_affect_each_other(toy, params):
    together = search(toy, params, stop=(3, (5, 1)))
    for row in range(3):
        same = jnp.tile(PROMPT[row], (3, 1)), jnp.tile(LENGTHS[row], 3)
        alone = search(toy, params, *same, stop=(3, (5, 1)))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-5)
    for row in range(3):
        for beam in range(3):
            length = together.lengths[row, beam]
            new = together.tokens[row, beam, LENGTHS[row] : length].tolist()
            mean = score(toy, params, PROMPT[row, : LENGTHS[row]].tolist(), new) / len(new)
            np.testing.assert_allclose(together.scores[row, beam], mean, rtol=1e-4)
            assert len(new) == STEPS or new[-1] == 3 or new[-2:] == [5, 1]


def test_fewer_texts_than_beams_are_marked(toy, params):
    done = search(toy, params, steps=1, num_beams=V + 2)
    assert np.isfinite(done.scores[:, :V]).all()
    assert np.isneginf(done.scores[:, V:]).all()
    np.testing.assert_array_equal(done.lengths[:, V:], np.broadcast_to(LENGTHS[:, None], (3, 2)))


def test_arguments_out_of_range_are_named_in_the_error(toy, params):
    for arguments, match in (
        ({"num_beams": 0}, "num_beams=0"),
        ({"steps": 0}, "steps=0"),
        ({"stop": ((),)}, "no tokens"),
        ({"stop": tuple(range(V))}, "V=7 tokens"),
        ({"steps": 13}, "room for 16"),
    ):
        given = {"steps": 2, "num_beams": 2} | arguments
        with pytest.raises(ValueError, match=match):
            beam_search(functools.partial(toy.decode, params), toy.empty_cache(3), PROMPT, **given)


@pytest.fixture(scope="module")
def gpt2():
    """A tiny GPT-2 with random weights of some size, from transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, initializer_range=0.7, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def uncached(model, make_toy):
    """Decode with a cache that holds the tokens themselves, which PyTorch reads anew each time."""
    import torch

    def logits(tokens):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens))).logits.numpy()

    def step(tokens, cache, last=False):
        place = cache.length[:, None] + jnp.arange(tokens.shape[1])[None]
        text = cache.keys.at[jnp.arange(len(cache.keys))[:, None], place].set(tokens)
        shape = jax.ShapeDtypeStruct((*text.shape, model.config.vocab_size), jnp.float32)
        every = jax.pure_callback(logits, shape, text)
        place = place[:, -1:] if last else place
        new = jnp.take_along_axis(every, place[..., None], axis=1)
        return new, cache._replace(keys=text, length=cache.length + tokens.shape[1])

    cache = make_toy(room=24).empty_cache(3)
    return step, cache._replace(keys=jnp.zeros((3, 24), jnp.int32))


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "stop"),
    [
        (False, 1.0, 3),
        (False, -0.7, (3, 11)),
        (True, 1.0, (3, 11)),
        (True, -0.7, 3),
        ("never", 1.0, (2, 6)),
        ("never", -0.7, 3),
    ],
)
def test_beams_are_those_of_transformers(gpt2, make_toy, early_stopping, length_penalty, stop):
    import torch

    step, cache = uncached(gpt2, make_toy)
    prompt = np.random.default_rng(0).integers(4, 11, (3, 4), np.int32)
    rules = {"num_beams": 3, "length_penalty": length_penalty, "early_stopping": early_stopping}
    search = functools.partial(beam_search, step, steps=8, stop=stop, pad=16, **rules)
    ours = jax.device_get(jax.jit(search)(cache, prompt))
    theirs = gpt2.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=8,
        num_return_sequences=3,
        eos_token_id=[stop] if isinstance(stop, int) else list(stop),
        pad_token_id=16,
        return_dict_in_generate=True,
        output_scores=True,
        **rules,
    )
    expected = theirs.sequences.numpy().reshape(3, 3, -1)
    width = expected.shape[-1]
    np.testing.assert_array_equal(ours.tokens[..., :width], expected)
    assert (ours.tokens[..., width:] == 16).all()
    scores = theirs.sequences_scores.numpy().reshape(3, 3)
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-4)
    assert len(set(ours.lengths.ravel().tolist())) > 1, "texts end at stops"
