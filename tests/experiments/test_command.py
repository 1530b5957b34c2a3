"""An experiment ends with a status and one line, whatever goes wrong."""

import dataclasses
import sys

import pytest

from experiments import command
from jaxformer.training.checkpoint import CheckpointError


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    steps: int = 1


def ending(monkeypatch, main, *arguments):
    """What the process ends with."""
    monkeypatch.setattr(sys, "argv", ["name", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.run(main, Config, "Does nothing.")
    return ended.value.code


def test_the_status_is_that_of_the_experiment(monkeypatch):
    assert ending(monkeypatch, lambda cfg: cfg.steps, "--steps", "7") == 7
    assert ending(monkeypatch, lambda cfg: 0, "--stops", "7") == 2


@pytest.mark.parametrize(
    "kind", [ValueError, FileExistsError, ModuleNotFoundError, CheckpointError]
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, kind):
    def main(cfg):
        raise kind("no such thing")

    assert ending(monkeypatch, main) == f"{kind.__name__}: no such thing"


def test_an_interrupt_is_said(monkeypatch, capsys):
    def main(cfg):
        raise KeyboardInterrupt

    assert ending(monkeypatch, main) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_mistake_of_ours_is_shown_whole(monkeypatch):
    def main(cfg):
        raise TypeError("a bug")

    monkeypatch.setattr(sys, "argv", ["name"])
    with pytest.raises(TypeError, match="a bug"):
        command.run(main, Config, None)
