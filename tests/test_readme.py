"""The README's example runs as it is printed there, and its commands and files exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_and_prints_what_its_comment_says(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    (promised,) = re.findall(r"print\(.*\)  # (.*)", example)
    assert capsys.readouterr().out.strip() == promised


def test_every_file_of_the_tree_is_there():
    (tree,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    folder, missing = pathlib.Path(), []
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = pathlib.Path(name) if name.endswith("/") else pathlib.Path()
        path = folder / name if line.startswith(" ") else pathlib.Path(name)
        if not (ROOT / path).exists():
            missing.append(str(path))
    assert not missing


def test_every_experiment_and_benchmark_is_named():
    for folder in ("experiments", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            if path.stem not in ("__init__", "record"):
                assert path.stem in README, path
