"""An encoder without positions cannot tell the sentences apart; with any it can."""

import json

import numpy as np
import pytest

from experiments import order_blind
from experiments.order_blind import Config

TINY = Config(encoders=2, width=8, num_heads=2, num_layers=1)
SCHEMES = order_blind.schemes()


def test_the_orders_have_the_same_words():
    told = order_blind.orders(TINY)
    assert told.tolist() == [[3, 1, 0, 3, 2], [3, 2, 0, 3, 1], [2, 3, 0, 1, 3]]


@pytest.mark.parametrize("name", SCHEMES)
def test_only_positions_tell_who_ate_whom(name):
    found = order_blind.vectors(TINY, SCHEMES[name])
    assert found.shape == (2, 3, 5, 8)
    row = order_blind.compare(found)
    blind = {"none": ["swapped", "backwards"], "ALiBi": ["backwards"]}
    assert row["same_vectors"] == blind.get(name, [])  # as sets of float32, exactly
    for order in ("swapped", "backwards"):
        if order in row["same_vectors"]:
            assert row[order] < 1e-14
        else:
            assert row[order] > 1e-4


def test_without_positions_each_word_keeps_its_vector_wherever_it_stands():
    found = order_blind.vectors(TINY, SCHEMES["none"])
    told = order_blind.orders(TINY)
    for word in range(4):
        places = told == word
        for each in found:
            np.testing.assert_allclose(each[places], each[places][:1].repeat(places.sum(), 0))


def test_a_run_writes_report_and_picture(tmp_path, capsys, monkeypatch):
    few = {name: SCHEMES[name] for name in ("none", "rotary")}
    monkeypatch.setattr(order_blind, "schemes", lambda: few)
    order_blind.main(Config(run=str(tmp_path), encoders=1, width=4, num_heads=1, num_layers=1))
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["schemes"]) == list(few)
    assert (tmp_path / "order_blind.png").stat().st_size > 1000
    assert "neither" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"swapped": "the dog ate the cat"}, "different words"),
        ({"swapped": "the cat ate the mouse"}, "the same"),
    ],
)
def test_sentences_that_prove_nothing_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        Config(**changes)
