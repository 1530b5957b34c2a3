"""Reports of several seeds are brought together, and only these."""

import json

import pytest

from experiments import seeds


@pytest.fixture
def runs(tmp_path):
    """Three runs, whose figures are one, two and six."""
    found = []
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config = {"run": str(folder), "seed": seed, "steps": 8, "model": {"width": 4}}
        report = {"data": "embedded", "steps": 8, "figure": value, "curve": [value]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "report.json").write_text(json.dumps(report))
        found.append(folder)
    return tuple(found)


def test_mean_and_deviation_are_those_of_a_sample(runs, capsys):
    found = seeds.summarize(runs)
    assert found["seeds"] == [0, 1, 2]
    assert found["figure"]["runs"] == [1, 2, 6]
    assert found["figure"]["mean"] == 3
    assert found["figure"]["deviation"] == pytest.approx(7**0.5)
    assert set(found) == {"seeds", "figure"}
    seeds.main(runs)
    assert "3 ± 2.6" in capsys.readouterr().out
    seeds.main(runs, json_line=True)
    assert json.loads(capsys.readouterr().out) == found


def test_what_is_no_other_seed_of_the_same_is_refused(runs):
    with pytest.raises(ValueError, match="two runs at least, got 1"):
        seeds.summarize(runs[:1])
    with pytest.raises(ValueError, match=r"different seeds, got \[0, 0\]"):
        seeds.summarize((runs[0], runs[0]))
    (runs[1] / "report.json").unlink()
    with pytest.raises(ValueError, match="1 holds no finished run"):
        seeds.summarize(runs)
    config = json.loads((runs[2] / "config.json").read_text())
    (runs[2] / "config.json").write_text(json.dumps(config | {"model": {"width": 5}}))
    with pytest.raises(ValueError, match=r"2 and .*0 differ in model"):
        seeds.summarize((runs[0], runs[2]))
