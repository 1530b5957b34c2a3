"""What a run leaves behind as text: JSON files, and metrics as one JSON object a line."""

import dataclasses
import enum
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def plain(value: Any) -> Any:
    """Turns a configuration or a report into what JSON holds.

    Dataclasses and mappings become dictionaries, sequences and arrays lists, paths strings, enum
    members their names, functions and types their qualified names.

    Raises:
        ValueError: If a value is none of these; the text names its type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, np.dtype):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise ValueError(f"JSON cannot hold {value!r} of type {type(value).__qualname__}.")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `plain(value)` as JSON: the file is the old one or the whole new one, never a part."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _replace(pathlib.Path(path), text.encode())


def table(figures: Mapping[str, Any]) -> str:
    """Writes a name and its value a line, in two columns; of floats four digits."""
    width = max(map(len, figures), default=0) + 3
    return "\n".join(
        f"{name:{width}}{value:.4g}"
        if isinstance(value, float | np.floating)
        else f"{name:{width}}{value}"
        for name, value in figures.items()
    )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl`; a last line cut short by a kill is left out.

    Raises:
        ValueError: If any other line is not a JSON object with a "step"; the text names it.
    """
    return [row for row, _ in _rows(pathlib.Path(path))]


def cut_metrics(path: str | os.PathLike[str], last_step: int) -> None:
    """Drops the rows after `last_step` and a half-written last line; no file is an empty one.

    Raises:
        ValueError: As `read_metrics`; the file is then left as it was.
    """
    path = pathlib.Path(path)
    if path.exists():
        _replace(path, b"".join(line for row, line in _rows(path) if row["step"] <= last_step))


def _rows(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
    found = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: not a JSON object with a step.")
        found.append((row, line))
    return found


def _replace(path: pathlib.Path, content: bytes) -> None:
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_bytes(content)
    os.replace(whole, path)
