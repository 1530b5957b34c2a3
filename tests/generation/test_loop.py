"""Prompts are read without an array of logits at all of their places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import loop, samplers
from jaxformer.generation.beam import beam_search
from jaxformer.generation.decode import complete
from jaxformer.generation.speculative import speculate
from jaxformer.generation.stream import stream
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig

B, P, V, STEPS = 2, 13, 17, 3
CONFIG = TransformerConfig(V, 8, 1, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6)
PROMPT = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, P)))
LENGTHS = jnp.array([13, 4])
DRAWS = {"sample": samplers.sampler(repetition_penalty=1.2, top_k=5), "key": jax.random.key(0)}


@pytest.fixture(scope="module")
def decoder(draw):
    """A decode function and its empty cache."""
    model = Decoder(CONFIG)
    variables = draw(model, PROMPT)
    return functools.partial(model.apply, variables), model.empty_cache(B, P + STEPS)


@pytest.fixture(scope="module")
def encoder_decoder(draw):
    """The same of an encoder-decoder that has read its sources."""
    model = EncoderDecoder(CONFIG)
    variables = draw(model, PROMPT[:, :5], PROMPT)
    cache = model.apply(variables, PROMPT[:, :5], max_length=P + STEPS, method="begin")
    return functools.partial(model.apply, variables, method="step"), cache


def shapes(f, *args):
    """The shapes of all arrays in the program of a function, those in its loops too."""
    found, left = set(), [jax.make_jaxpr(f)(*args).jaxpr]
    while left:
        jaxpr = left.pop()
        for equation in jaxpr.eqns:
            found |= {x.aval.shape for x in equation.outvars}
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
            left += [getattr(x, "jaxpr", x) for x in inner if is_program(x)]
    return found


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def of_prompts(found):
    return [shape for shape in found if V in shape and np.prod(shape) >= P * V]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["alike", "ragged"])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_no_array_has_the_logits_of_all_places_of_a_prompt(request, kind, lengths):
    decode, cache = request.getfixturevalue(kind)
    rest = {"steps": STEPS, "prompt_lengths": lengths}
    assert of_prompts(shapes(decode, PROMPT, cache)), "the model alone makes them"
    for write in (
        functools.partial(complete, decode, **rest, **DRAWS),
        functools.partial(beam_search, decode, num_beams=2, **rest),
        lambda cache, prompt: speculate(
            decode, cache, decode, cache, prompt, draft_steps=2, **rest, **DRAWS
        ),
    ):
        assert not of_prompts(shapes(write, cache, PROMPT))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_what_cannot_fit_is_refused_before_the_model_runs(request, kind):
    _, cache = request.getfixturevalue(kind)

    def decode(*args, **options):
        raise AssertionError("the model was run")

    message = r"prompt_lengths\[0\]=13 .* 17 places; the cache has room for 16"
    steps = {"steps": 5}
    for write in (
        lambda: complete(decode, cache, PROMPT, **steps, **DRAWS),
        lambda: stream(decode, cache, PROMPT, prompt_lengths=LENGTHS, **steps, **DRAWS),
        lambda: beam_search(decode, cache, PROMPT, num_beams=2, prompt_lengths=LENGTHS, **steps),
        lambda: speculate(decode, cache, decode, cache, PROMPT, draft_steps=2, **steps, **DRAWS),
        lambda: jax.eval_shape(
            lambda cache: complete(decode, cache, PROMPT, **steps, **DRAWS), cache
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write()


def test_a_model_that_scores_all_places_is_refused(decoder):
    decode, cache = decoder

    def deaf(tokens, cache, last=False):
        return decode(tokens, cache)

    with pytest.raises(ValueError, match="a prompt's logits are of one place, got T=13"):
        loop.prefill(deaf, cache, PROMPT, LENGTHS, ragged=False)
    logits, _ = loop.prefill(deaf, cache, PROMPT[:, :1], LENGTHS, ragged=False)
    assert logits.shape == (B, V)
