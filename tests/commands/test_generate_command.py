"""`jaxformer generate` and `jaxformer inspect`, on a folder made here."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from jaxformer import cli, interop
from jaxformer.generation import decode, samplers
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.tokenizers.plain import Bytes

CONFIG = TransformerConfig(
    300, 8, 1, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6, epsilon=1e-5, max_length=64
)


@pytest.fixture(scope="module")
def folder(draw, tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoint") / "model"
    interop.save(Decoder(CONFIG), draw(Decoder(CONFIG), jnp.zeros((1, 1), int)), made)
    Bytes().save(made / "tokenizer.json")
    return made


def run(capsys, *words):
    code = cli.main([str(x) for x in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_writes_what_the_model_would(capsys, folder):
    code, out, err = run(
        capsys, "generate", folder, "--prompt", "ab", "--bos", "no", "--max-new-tokens", 9
    )
    assert code == 0, err
    model, params = interop.load(folder)
    ids = decode.generate(
        functools.partial(model.apply, params),
        model.empty_cache(1, 16),
        jnp.array([list(b"ab")]),
        steps=9,
        sample=samplers.greedy(),
        key=jax.random.key(0),
    )
    words = Bytes()
    kept = [token for token in ids[0].tolist() if token < words.vocab_size]
    assert out == words.decode(kept) + "\n"


def test_draws_repeat_and_depend_on_the_seed(capsys, folder):
    given = [
        "generate",
        folder,
        "--prompt",
        "ab",
        "--bos",
        "no",
        "--temperature",
        "2",
        "--max-new-tokens",
        "20",
        "--seed",
    ]
    one, again, other = (run(capsys, *given, seed) for seed in (1, 1, 2))
    assert one[0] == 0, one
    assert one == again != other


def test_a_text_ends_before_its_stop(capsys, folder):
    given = ["generate", folder, "--prompt", "ab", "--bos", "no", "--max-new-tokens", 20]
    whole = run(capsys, *given)[1]
    new = whole[2:-1]
    stop = new[3:5]
    assert run(capsys, *given, "--stop", stop)[1] == "ab" + new[: new.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 70], "has 70 tokens"),
        (["--prompt", "x", "--temperature", "0"], "temperature"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "1.5"], "p=1.5"),
        (["--prompt", "x", "--top-k", "0"], "k=0"),
        (["--prompt", "x", "--repetition-penalty", "0"], "penalty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--stop", ""], "--stop"),
        (["--prompt", "x", "--bos", "yes"], "bos_token_id"),
        (["--prompt", "x", "--tokenizer", "/nowhere"], "/nowhere"),
        ([], "--prompt"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(capsys, folder, words, message):
    if "--bos" not in words:
        words = [*words, "--bos", "no"]
    code, out, err = run(capsys, "generate", folder, *words)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(capsys, draw, tmp_path):
    small = TransformerConfig(
        50, 8, 1, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6, epsilon=1e-5, max_length=64
    )
    interop.save(Decoder(small), draw(Decoder(small), jnp.zeros((1, 1), int)), tmp_path / "small")
    Bytes().save(tmp_path / "small" / "tokenizer.json")
    code, _, err = run(capsys, "generate", tmp_path / "small", "--prompt", "x", "--bos", "no")
    assert code == 2
    assert "vocabulary of 50" in err


def test_a_prompt_is_not_padded_beyond_the_positions_of_its_model(capsys, draw, tmp_path):
    biases = {name: True for name in ("qkv_bias", "out_bias", "mlp_bias")}
    config = TransformerConfig(
        300,
        8,
        1,
        2,
        2,
        4,
        6,
        positions="learned",
        max_length=40,
        gated=False,
        norm="layer",
        activation="gelu_tanh",
        epsilon=1e-5,
        **biases,
    )
    interop.save(Decoder(config), draw(Decoder(config), jnp.zeros((1, 1), int)), tmp_path / "gpt2")
    Bytes().save(tmp_path / "gpt2" / "tokenizer.json")
    given = ["--bos", "no", "--prompt", "x" * 34, "--max-new-tokens", 6]
    code, out, err = run(capsys, "generate", tmp_path / "gpt2", *given)
    assert code == 0, err
    assert out.startswith("x" * 34)


def test_inspect_counts(capsys, folder):
    code, out, err = run(capsys, "inspect", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    sizes = [x.size for x in jax.tree.leaves(interop.load(folder)[1])]
    assert found["parameters"]["total"] == sum(sizes)
    assert found["generation"]["cache of a text, bfloat16"] == 64 * 2 * 4 * 2 + 4
    assert run(capsys, "inspect", folder)[1].startswith("architecture")
    assert run(capsys, "inspect", folder / "nowhere")[0] == 2
    assert run(capsys, "inspect", folder, "--context", 0)[0] == 2
