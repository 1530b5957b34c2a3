"""Published weights say what they said where they were published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import interop
from jaxformer.generation import decode, samplers


@pytest.fixture
def stories(real_data):
    folder = real_data / "pretrained" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def test_stories260k_writes_its_story_token_for_token(stories, close):
    golden = np.load(stories / "golden.npz")
    model, params = interop.load(stories / "hf")
    prompt = golden["prompt_ids"]
    logits = jax.jit(model.apply)(params, jnp.asarray(prompt[None]))
    close(logits[0], golden["prompt_logits"], "logits")
    ids = golden["greedy_ids"]

    @jax.jit
    def write(params, start):
        return decode.generate(
            lambda *args: model.apply(params, *args),
            model.empty_cache(1, len(ids)),
            start,
            steps=len(ids) - 1,
            sample=samplers.greedy(),
            key=jax.random.key(0),
        )

    np.testing.assert_array_equal(write(params, jnp.asarray(ids[None, :1]))[0], ids)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_small_models_say_what_they_said(real_data, close, name):
    folder = real_data / "hf_tiny" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    golden = np.load(folder / "io.npz")
    model, params = interop.load(folder)
    logits = jax.jit(model.apply)(params, jnp.asarray(golden["input_ids"]))
    close(logits, golden["logits"], name)
