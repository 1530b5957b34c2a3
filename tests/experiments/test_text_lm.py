"""The experiment in small: what it leaves, how it stops and goes on, and what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tyro

from experiments import text_lm, texts
from jaxformer.models.transformer import TransformerConfig
from jaxformer.training import checkpoint, mesh, run

MODEL = TransformerConfig(1, 8, 1, 2, 2, 4, 8)


@pytest.fixture(scope="module")
def poem(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "poem.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall.\n" for n in range(60)))
    return str(path)


def config(folder, *names, **changes):
    settings = {"run": str(folder), "data": names, "model": MODEL, "context": 8, "steps": 6}
    settings |= {"batch": 4, "warmup": 2, "mesh": "data=1", "save_every": 2, "log_every": 1}
    return text_lm.Config(**settings | changes)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(poem, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    assert text_lm.main(config(folder, poem)) == 0
    return folder


def test_a_run_leaves_report_curve_and_samples(whole, poem):
    report = json.loads((whole / "report.json").read_text())
    assert report["data"] == poem
    assert report["steps"] == 6
    assert 0 < report["nats_per_character"] == report["nats_per_token"] < 4
    assert report["bits_per_byte"] == pytest.approx(report["nats_per_token"] / np.log(2))
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (whole / "samples.txt").read_text().split("\n\n-----\n\n")
    assert [len(sample) for sample in samples] == [9 * 4] * 3
    read = [(row["step"], row["validation"]) for row in rows(whole) if "validation" in row]
    assert [step for step, _ in read] == [2, 4, 6]
    assert read[-1][1] == pytest.approx(report["nats_per_token_in_separate_windows"], rel=1e-6)
    losses = [row["loss"] for row in rows(whole) if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_stopped_run_goes_on_to_the_same_numbers_and_then_trains_no_more(
    whole, poem, tmp_path, monkeypatch, stopped
):
    cfg = config(tmp_path, poem)
    stopped(text_lm, cfg, 3)
    assert not (tmp_path / "report.json").exists()
    assert text_lm.main(cfg) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    monkeypatch.setattr(text_lm, "jit_step", lambda *_: pytest.fail)
    assert text_lm.main(cfg) == 0
    for name in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_another_text_of_the_same_length_is_refused(whole, poem, tmp_path):
    other = tmp_path / "other.txt"
    with open(poem) as file:
        other.write_text(file.read().replace("green", "brown"))
    with pytest.raises(checkpoint.CheckpointError, match="text: "):
        text_lm.main(config(whole, str(other)))


def test_minutes_become_steps_that_the_folder_remembers(poem, tmp_path):
    cfg = config(tmp_path, poem, minutes=0.05)
    text = texts.load(cfg.data)
    model = text_lm.Decoder(dataclasses.replace(MODEL, vocab_size=text.tokenizer.vocab_size))
    settled = text_lm.settle(cfg, model, text, mesh.make(cfg.mesh))
    assert 1 < settled.steps < 1_000_000
    told = dataclasses.asdict(dataclasses.replace(settled, steps=17))
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert text_lm.settle(cfg).steps == 17


def test_four_devices_give_the_loss_of_one(whole, poem, tmp_path):
    cfg, text = config(tmp_path, poem, mesh="data=4"), texts.load([poem])
    model = text_lm.Decoder(dataclasses.replace(MODEL, vocab_size=text.tokenizer.vocab_size))
    with run.Run(cfg.run) as record:
        text_lm.train(cfg, model, text, mesh.make(cfg.mesh), record)
    for many, one in zip(rows(tmp_path), rows(whole), strict=True):
        assert many == pytest.approx(one, rel=1e-3)


def test_pieces_of_bytes_are_learned_as_well(poem, tmp_path):
    assert text_lm.main(config(tmp_path, poem, bpe=260, steps=1)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["vocabulary"] == 260
    tokens, characters = report["nats_per_token"], report["nats_per_character"]
    assert characters < tokens


def test_every_setting_is_written_on_the_command_line():
    cfg = tyro.cli(text_lm.Config, args=["--data", "a.txt", "b.txt", "--model.width", "64"])
    assert cfg.data == ("a.txt", "b.txt")
    assert cfg.model.width == 64
    model = text_lm.Config().model
    assert dataclasses.replace(cfg, data=("embedded",), model=model) == text_lm.Config()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stpes", "3"], "--steps"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--context", "3"], "context must be at least 4, got 3"),
        (["--minutes", "-1"], "minutes must be at least 0, got -1"),
        (["--model.head-dim", "7"], "even head size, got H=7"),
    ],
)
def test_a_wrong_flag_or_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(text_lm.Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(texts.TextError, match="1, of the last tenth"):
        text_lm.main(config(tmp_path / "run", str(tmp_path / "short.txt")))
