"""Safetensors files of a folder, read one tensor at a time."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Tensors:
    """What tensors the safetensors files of a folder hold; reading never unpickles.

    Raises:
        FileNotFoundError: If there are none, or an index names one that is missing.
        ValueError: If a file or the index is broken, or two files hold one tensor.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._place: dict[str, pathlib.Path] = {}
        for path in self._paths():
            try:
                self._files[path.name] = file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{path} is no sound safetensors file: {error}") from None
            for name in file.keys():  # noqa: SIM118
                if name in self._place:
                    raise ValueError(f"{path} and {self._place[name]} both hold {name}.")
                self._place[name] = path

    def _paths(self) -> Iterator[pathlib.Path]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is no index of safetensors files: {error!r}") from None
        else:
            names = ["model.safetensors"]
        for name in names:
            path = self.folder / name
            if pathlib.Path(name).name != name:
                raise ValueError(f"{index} names a file outside its folder: {name}.")
            if not path.is_file():
                others = [x.name for x in self.folder.glob("*.bin")]
                hint = f"; {others} are pickles, which are not read" if others else ""
                raise FileNotFoundError(f"{path} does not exist{hint}.")
            yield path

    def names(self) -> set[str]:
        """All tensors there are."""
        return set(self._place)

    def place(self, name: str) -> pathlib.Path:
        """The file of a tensor."""
        return self._place[name]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
            ValueError: If it cannot be read, or holds NaN.
        """
        path = self._place[name]
        try:
            x = self._files[path.name].get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        # A sum takes no memory, and is NaN too where it ought to be looked at more closely.
        if x.dtype.kind not in "iub" and np.isnan(x.sum()) and np.isnan(x).any():
            raise ValueError(f"{path}: {name} holds NaN.")
        return x


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Writes tensors to one file, or to several with an index if there are too many bytes."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(x)
        size += x.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(x.nbytes for x in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
