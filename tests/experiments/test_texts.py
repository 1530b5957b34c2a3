"""Texts are read whole or refused, and every token of them is read once, from what it should be."""

import functools
import gzip

import jax
import numpy as np
import pytest

from experiments import texts
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.training import mesh

V, T = 7, 4
MODEL = Decoder(TransformerConfig(V, 8, 1, 2, 2, 4, 8))


def ids(size, seed=0):
    return np.random.default_rng(seed).integers(0, V, size).astype(np.int32)


def test_the_manual_of_python_has_hundreds_of_kilobytes_and_no_paragraph_twice():
    text = texts.load(["embedded"])
    whole = text.tokenizer.decode(np.concatenate([text.train, text.valid]))
    assert len(whole) > 300_000
    assert len(text.train) == int(0.9 * len(whole))
    paragraphs = [part.strip("\n") for part in whole.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert "break" in whole


@pytest.mark.parametrize("vocab_size", [0, 270])
def test_files_are_joined_and_come_back_from_their_tokens(tmp_path, vocab_size):
    first, second = "To be, or not to be: ß\n" * 20, "that is the question …\n" * 9
    (tmp_path / "first.txt").write_text(first)
    (tmp_path / "second.txt.gz").write_bytes(gzip.compress(second.encode()))
    names = [str(tmp_path / name) for name in ("first.txt", "second.txt.gz")]
    text = texts.load(names, vocab_size)
    parts = [text.tokenizer.decode(part) for part in (text.train, text.valid)]
    assert "".join(parts) == first + second
    assert len(parts[0]) == int(0.9 * len(first + second))
    assert text.tokenizer.vocab_size == (vocab_size or len(set(first + second)))


def test_merges_are_learned_from_the_training_text_alone(tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 450 + "cd" * 50)
    tokenizer = texts.load([str(tmp_path / "text.txt")], 300).tokenizer
    assert len(tokenizer.encode("abab")) == 1
    assert len(tokenizer.encode("cdcd")) == 4


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "expected 'embedded', 'tfds:DIR' or files of text"),
        ("empty.txt", b"", "the text is empty"),
        ("short.txt", b"abc" * 20, "54 tokens to learn from and 6.*there must be 9"),
        ("binary.txt", b"\xff\xfe", "can't decode byte 0xff"),
        ("cut.gz", gzip.compress(b"long " * 99, mtime=0)[:-9], "end-of-stream"),
        ("plain.gz", b"no gzip at all", "Not a gzipped file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(texts.TextError, match=f"(?s){name}: .*{told}"):
        texts.load([str(tmp_path / name)], least=9)


def test_a_vocabulary_too_small_for_bytes_and_a_folder_without_a_set_are_refused(tmp_path):
    with pytest.raises(texts.TextError, match="vocab_size=255 is smaller"):
        texts.load(["embedded"], 255)
    with pytest.raises(texts.TextError, match="expected a folder with tiny_shakespeare"):
        texts.load([f"tfds:{tmp_path}"])


def test_tiny_shakespeare_is_cut_where_everyone_cuts_it(real_data):
    pytest.importorskip("tensorflow_datasets")
    text = texts.load([f"tfds:{real_data / 'tfds'}"])
    assert (len(text.train), len(text.valid)) == (1_003_854, 111_540)
    assert text.tokenizer.vocab_size == 65
    assert text.tokenizer.decode(text.train[:14]) == "First Citizen:"


@pytest.fixture(scope="module")
def params(draw):
    return draw(MODEL, ids((1, T)))


@pytest.mark.parametrize(("stride", "devices"), [(1, "data=1"), (3, "data=8"), (T, "data=8")])
def test_every_token_is_predicted_once_from_its_own_window(params, stride, devices):
    before, tokens = ids(13, seed=1), ids(11, seed=2)
    read = texts.make_reader(MODEL, T, mesh.make(devices))
    known, nats, apply = np.concatenate([before, tokens]), [], jax.jit(MODEL.apply)
    for place in range(len(tokens)):
        seen = T - stride + 1 + place % stride  # tokens before it in its window
        end = len(before) + place
        logits = np.asarray(apply(params, known[None, end - seen : end])[0, -1], np.float64)
        nats.append(np.log(np.exp(logits).sum()) - logits[known[end]])
    assert read(params, before, tokens, stride) == pytest.approx(sum(nats), rel=1e-5)


def test_figures_count_tokens_characters_and_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 90 + "ß" * 10)
    text = texts.load([str(tmp_path / "text.txt")], 256)
    found = texts.figures(text, 8, lambda stride: {2: 30.0, 8: 40.0}[stride])
    assert found["validation_tokens"] == 20
    assert found["nats_per_token"] == 1.5
    assert found["nats_per_token_in_separate_windows"] == 2.0
    assert found["nats_per_character"] == 3.0
    assert found["bits_per_byte"] == pytest.approx(1.5 / np.log(2))


def test_what_is_written_follows_the_start_and_depends_on_the_seed_alone(params):
    write = functools.partial(texts.write, MODEL, params, ids(9), T)
    new = write(0)
    assert new.shape == (3, 9 * T // 2)
    np.testing.assert_array_equal(new[:, :2], np.tile(ids(9)[-2:], (3, 1)))
    assert ((new >= 0) & (new < V)).all()
    np.testing.assert_array_equal(new, write(0))
    assert (new != write(1)).any()
    assert (new[0] != new[1]).any()
