"""The texts ask for what they said, and a few steps of each model end in a report."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import associative_recall
from experiments.associative_recall import Config

TINY = Config(pairs=(2, 3), vocab=7, width=8, num_features=5, steps=2, batch=5, tests=1)


@pytest.mark.parametrize("pairs", [None, 2, 3])
def test_every_question_has_the_value_that_followed_its_key(pairs):
    batch = associative_recall.texts(TINY, np.random.default_rng(0), pairs)
    counts = set()
    for tokens, answers in zip(batch["tokens"], batch["answers"]):
        told, asked = tokens[:6], tokens[6:]
        said = {key: value for key, value in zip(told[::2], told[1::2]) if key < 2 * TINY.vocab}
        questions = asked[answers >= 0]
        counts.add(len(said))
        assert sorted(questions) == sorted(said)
        assert [said[key] for key in questions] == list(answers[answers >= 0])
        assert (asked[answers < 0] == 2 * TINY.vocab).all()
    assert counts == ({2, 3} if pairs is None else {pairs})


def test_a_run_reports_every_model_and_draws_the_picture(tmp_path, capsys):
    associative_recall.main(dataclasses.replace(TINY, run=str(tmp_path)))
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["models"]) == ["softmax", "elu + 1", "ReLU", "Taylor", "5 random"]
    for row in report["models"].values():
        assert list(row["accuracy"]) == ["2", "3"]
        assert all(0 <= share <= 1 for share in row["accuracy"].values())
    assert report["models"]["elu + 1"]["state"] == 4 * 2 * 3  # heads, features, values and a sum
    assert (tmp_path / "recall.png").stat().st_size > 1000
    assert "Taylor" in capsys.readouterr().out
