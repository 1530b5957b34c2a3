"""The experiment in small: what it leaves, how it stops and goes on, and what it refuses."""

import dataclasses
import gzip
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import pairs, translation
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.ops import attention
from jaxformer.training import checkpoint

MODEL = TransformerConfig(1, 8, 1, 2, 2, 4, 8, positions="learned", max_length=1)


def config(folder, name, **changes):
    settings = {"run": str(folder), "data": name, "model": MODEL, "longest": 9, "steps": 4}
    settings |= {"batch": 4, "warmup": 2, "mesh": "data=1", "save_every": 2, "log_every": 1}
    settings |= {"tests": 5, "beams": 2}
    return translation.Config(**settings | changes)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A folder of pairs, one of which is too long, with two translations of some tests."""
    folder = tmp_path_factory.mktemp("numbers")
    rows = [f"{n} men\t{n} hommes" for n in range(10, 40)] + ["many many men\tbien des hommes"]
    with gzip.open(folder / "a_train.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")
    (folder / "a_test.tsv").write_text("41 men\t41 hommes\t41 gars\n42 men\t42 hommes\n7?\tsept\n")
    return str(folder)


@pytest.fixture
def bleu(monkeypatch):
    """Stands in for sacrebleu; the list of what it was asked."""
    asked = []

    class Package:
        @staticmethod
        def corpus_bleu(written, references):
            asked.append((written, references))
            return type("Score", (), {"score": 12.5})

    monkeypatch.setitem(sys.modules, "sacrebleu", Package)
    return asked


def test_a_run_leaves_report_pictures_and_samples(numbers, bleu, tmp_path):
    assert translation.main(config(tmp_path, numbers)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["pairs"], report["tests"], report["steps"]) == (31, 3, 4)
    assert report["bleu_greedy"] == report["bleu_beams"] == 12.5
    assert 0 <= report["exact_greedy"] <= 1
    for name in ("loss.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "samples.tsv").read_text(encoding="utf-8").splitlines()
    assert [row.split("\t")[0] for row in rows] == ["41 men", "42 men", "7?"]
    assert bleu[0][1] == [["41 hommes", "42 hommes", "sept"], ["41 gars", None, None]]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]


def test_a_stopped_run_goes_on_to_the_same_numbers(numbers, bleu, tmp_path, stopped):
    assert translation.main(config(tmp_path / "whole", numbers)) == 0
    cfg = config(tmp_path / "run", numbers)
    stopped(translation, cfg, 3)
    assert translation.main(cfg) == 0
    for name in ("metrics.jsonl", "samples.tsv"):
        one, other = (tmp_path / folder / name for folder in ("whole", "run"))
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="bpe: 0 there, 256 here"):
        translation.main(dataclasses.replace(cfg, bpe=256))


def test_batches_leave_out_what_is_too_long_and_nothing_else(numbers, bleu):
    cfg = config("", numbers, batch=30)
    batch = translation.batches(cfg, pairs.load(numbers)).batch(0)
    assert batch["source"].shape == (30, 6)
    assert batch["target"].shape == (30, 10)
    assert set(batch["sizes"]) == {6}
    assert set(batch["counts"]) == {9}
    assert len(np.unique(batch["source"], axis=0)) == 30
    with pytest.raises(pairs.PairsError, match="30 pairs have no more than 9 tokens"):
        translation.batches(config("", numbers, batch=31), pairs.load(numbers))


def test_greedy_writing_takes_the_likeliest_token_each_time(numbers, bleu, draw):
    found = pairs.load(numbers)
    sizes = {"vocab_size": found.start + 2, "max_length": 10}
    model = EncoderDecoder(dataclasses.replace(MODEL, **sizes))
    params = draw(model, jnp.zeros((1, 2), int), jnp.zeros((1, 2), int))
    written = pairs.write(model, params, found, 9, 1, rows=2)
    source, lengths = map(jnp.asarray, found.cut([row[0] for row in found.tests], 9))
    target, end = np.full((3, 11), found.start), found.start + 1
    mask = attention.key_lengths(lengths)
    read = jax.jit(lambda target: model.apply(params, source, target, mask).argmax(-1))
    for i in range(10):
        target[:, i + 1] = read(jnp.asarray(target[:, :10]))[:, i]
    for row, text in zip(target[:, 1:], written, strict=True):
        length = [*row, end].index(end)
        assert found.text(row[:length]) == text


def test_embedded_strings_are_reversed_and_no_test_is_learned_from():
    found = pairs.load("embedded")
    assert all(other == text[::-1] for text, other in (*found.train, *found.tests))
    assert not {*found.train} & {*found.tests}
    assert (len(found.train), found.tokenizer.vocab_size) == (20_000, 27)
    tokens, lengths = found.cut(["abc", "q" * 50], 5)
    assert lengths.tolist() == [3, 5]
    assert (tokens[0, 3:] == found.start + 1).all()
    assert [found.text(row) for row in tokens] == ["abc", "qqqqq"]


def test_a_file_gives_its_last_tenth_for_tests(bleu, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{n}\t{n * n}\n" for n in range(40)))
    found = pairs.load(str(path), 260)
    assert [row[0] for row in found.tests] == ["36", "37", "38", "39"]
    assert len(found.train) == 36
    assert found.tokenizer.vocab_size <= 260


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a\tb\nalone\n", "line 2 of pairs.tsv is no source, tab and translation"),
        ("a\tb\n", "0 pairs to learn from"),
        (None, "No such file"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused(bleu, tmp_path, content, told):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(pairs.PairsError, match=told):
        pairs.load(str(path))


def test_without_sacrebleu_pairs_of_yours_are_refused_before_training(monkeypatch, numbers):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(pairs.PairsError, match=r"needs the package sacrebleu: pip .*\[data\]"):
        pairs.load(numbers)


def test_every_setting_is_written_on_the_command_line():
    cfg = tyro.cli(translation.Config, args=["--data", "a.tsv", "--model.width", "32"])
    assert (cfg.data, cfg.model.width) == ("a.tsv", 32)
    model = translation.Config().model
    assert dataclasses.replace(cfg, data="embedded", model=model) == translation.Config()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--stpes", "3"], "--steps"), (["--beams", "0"], "beams must be at least 1, got 0")],
)
def test_a_wrong_flag_or_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(translation.Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)
