"""Checkpoints that survive kills, flipped bits and full disks.

    with Checkpoints(run / "checkpoints", config) as checkpoints:
        restored = checkpoints.restore(state)
        ...
        checkpoints.save(step, state, source.position(step))

A folder holds one directory a step, written by orbax in the background and renamed into place when
whole, and beside them `trash` (old steps on their way out) and `damaged` (steps that could not be
read, kept for inspection). Orbax takes a second to import: that happens at the first save, or the
first restore that finds a step, unless `preload` began it earlier.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxformer.training import fingerprint, leaves
from jaxformer.typing import PyTree

_TRASH, _DAMAGED, _UNFINISHED = "trash", "damaged", ".orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or accepted; the text says what to do."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was set aside and an older one is used."""


class _Damaged(Exception):
    """What is stored contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
        step: The step it was saved at.
        state: A tree of the structure, dtypes and shardings that were asked for.
        data_position: The mapping given to `save`, as JSON returns it.
    """

    step: int
    state: PyTree
    data_position: dict[str, Any]


def preload() -> None:
    """Begins to import orbax in a background thread; call it after the program's own imports."""
    threading.Thread(target=importlib.import_module, args=("orbax.checkpoint",)).start()


class Checkpoints:
    """The last few checkpoints of one run, in one folder; a context manager.

    Saving is asynchronous: `save` returns once the state is copied to the host, and the arrays may
    be donated at once. A failed write surfaces as CheckpointError at the next `save`, `wait` or
    `close`, whichever comes first; older steps are then still there. A process killed at any moment
    leaves only whole steps: an unfinished one has another name, and an old one is renamed before it
    is deleted. What a kill leaves behind is removed when the folder is next opened.

    With several processes every process makes the same calls, on a file system they share.

    Args:
        folder: Where the steps lie; made when missing. One run at a time may write to it.
        config: The settings that give the arrays their meaning, as JSON. Checkpoints of another
            config are refused; what does not change the result (paths, log intervals) is left out.
        keep: How many steps to keep, at least 1; the oldest go first.

    Raises:
        ValueError: If `keep` is below 1.
        TypeError: If `config` is not JSON.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any], *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"Checkpoints keeps at least one step, got keep={keep}.")
        self.folder = pathlib.Path(folder).absolute()
        self._config = json.loads(json.dumps(dict(config)))
        self._keep = keep
        self._manager: Any = None
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps on disk, oldest first; damaged ones that nobody has tried to read included."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The newest step on disk; one still being written does not count."""
        return max(self.steps, default=None)

    def save(
        self, step: int, state: PyTree, data_position: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Writes a checkpoint in the background, after the one before it is finished.

        Args:
            step: Not negative, and above every step in the folder.
            state: A tree of JAX or NumPy arrays, typed random keys included.
            data_position: Where the data stands, as JSON; comes back from `restore`.
            wait: Return only when the checkpoint is whole on disk.

        Raises:
            CheckpointError: If this save or the one before it failed (no space, no permission, a
                failing disk), if the folder holds `step` or a later one, or another config's steps.
            ValueError: If `step` is negative or a leaf of `state` is not an array.
        """
        if step < 0:
            raise ValueError(f"A checkpoint needs step >= 0, got step={step}.")
        named = leaves.named(state)
        body = {
            "step": step,
            "config": self._config,
            "data_position": dict(data_position),
            "leaves": {name: leaves.kind(leaf) for name, leaf in named.items()},
        }
        manager = self._open()
        self.wait()
        newest = self.latest_step
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"Step {step} cannot be saved into {self.folder}, which holds step {newest}: "
                "restore that one and go on from it, or choose another folder."
            )
        args = importlib.import_module("orbax.checkpoint").args
        arrays = {
            "state": {name: leaves.storable(leaf) for name, leaf in named.items() if leaf.size},
            "fingerprints": fingerprint.fingerprints(list(named.values())),
        }
        try:
            self._require_space(sum(leaf.nbytes for leaf in named.values()))
            accepted = manager.save(
                step,
                args=args.Composite(
                    arrays=args.StandardSave(arrays),
                    meta=args.JsonSave({"body": body, "digest": _digest(body)}),
                ),
            )
            if not accepted:
                raise RuntimeError("orbax declined to save it")
        except Exception as error:
            raise self._failure(step, error) from error
        self._saving = step
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save that is under way is whole on disk.

        Raises:
            CheckpointError: If that save failed.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            if step not in self.steps:
                raise RuntimeError("its directory did not appear")
        except Exception as error:
            raise self._failure(step, error) from error
        self._remove(self.folder / _TRASH)

    def close(self) -> None:
        """Finishes the save that is under way and frees the threads; may be called twice.

        Raises:
            CheckpointError: If that save failed.
        """
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def restore(self, like: PyTree) -> Restored | None:
        """Reads the newest checkpoint that is whole, onto the devices of `like`.

        A step that cannot be read, or whose contents do not match their fingerprints, is moved to
        `damaged` with a CheckpointWarning once an older one has proved whole, and saving goes on
        from that older one.

        Args:
            like: The tree to fill: arrays or `jax.ShapeDtypeStruct`, whose shardings decide where
                the contents go, whatever devices they were saved from. Leaves without a sharding,
                and uncommitted arrays, come back uncommitted on the default device.

        Returns:
            The checkpoint, or None where the folder holds no step.

        Raises:
            CheckpointError: If the steps were saved under another config or for a tree of other
                leaves, or if none of them is whole. Nothing is moved then.
            ValueError: If a leaf of `like` is not an array.
        """
        if not self.steps:
            return None
        self._open()
        reasons: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                restored, reason = self._read(step, like), ""
            except CheckpointError:
                raise
            except Exception as error:
                restored, reason = None, _cause(error)
            if _everywhere(restored is not None):
                self._set_aside(reasons, step)
                return restored
            reasons[step] = reason or "another process could not read it"
        told = "\n".join(f"  step {step}: {reason}" for step, reason in reasons.items())
        raise CheckpointError(
            f"No checkpoint in {self.folder} is whole, and none was touched:\n{told}\n"
            "Repair one of them, or move them away to start anew."
        )

    def _open(self) -> Any:
        if self._manager is not None:
            return self._manager
        ocp = importlib.import_module("orbax.checkpoint")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, todelete_subdir=_TRASH, save_root_metadata=False
            )
            self._manager = ocp.CheckpointManager(
                self.folder, item_names=("arrays", "meta"), options=options
            )
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be used for checkpoints: {error}"
            ) from error
        try:
            self._refuse_another_config()
        except CheckpointError:
            self.close()
            raise
        self._sweep()
        return self._manager

    def _refuse_another_config(self) -> None:
        for step in self.steps:
            try:
                stored = self._meta(step)["config"]
            except Exception:  # `restore` tells what is wrong with it
                continue
            _refuse_differences(
                f"Step {step} in {self.folder} was saved under another config", stored, self._config
            )

    def _meta(self, step: int) -> dict[str, Any]:
        args = importlib.import_module("orbax.checkpoint").args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if _digest(meta["body"]) != meta["digest"]:
            raise _Damaged("its config and data position do not match their checksum")
        if meta["body"]["step"] != step:
            raise _Damaged(f"it was saved as step {meta['body']['step']}")
        return meta["body"]

    def _read(self, step: int, like: PyTree) -> Restored:
        meta, named = self._meta(step), leaves.named(like)
        _refuse_differences(
            f"Step {step} in {self.folder} holds other arrays than this program's",
            meta["leaves"],
            {name: leaves.kind(leaf) for name, leaf in named.items()},
        )
        args = importlib.import_module("orbax.checkpoint").args
        target = {
            "state": {name: leaves.target(leaf) for name, leaf in named.items() if leaf.size},
            "fingerprints": np.empty(len(named), np.uint32),
        }
        arrays = self._manager.restore(
            step, args=args.Composite(arrays=args.StandardRestore(target))
        )["arrays"]
        found = [leaves.filled(leaf, arrays["state"].get(name)) for name, leaf in named.items()]
        matches = np.asarray(fingerprint.fingerprints(found)) == arrays["fingerprints"]
        if not matches.all():
            names = [name for name, match in zip(named, matches) if not match]
            raise _Damaged(f"{len(names)} arrays do not match their fingerprints: {names[:5]}")
        state = jax.tree.unflatten(jax.tree.structure(like), found)
        return Restored(step, state, meta["data_position"])

    def _set_aside(self, reasons: dict[int, str], good: int) -> None:
        for step, reason in reasons.items():
            place = self.folder / _DAMAGED / str(step)
            while place.exists():
                place = place.with_name(f"{place.name}+")
            if jax.process_index() == 0:
                place.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(place)
            warnings.warn(
                f"Step {step} in {self.folder} is damaged ({reason}); it was moved to {place}, and "
                f"step {good} is used instead.",
                CheckpointWarning,
                stacklevel=3,
            )
        if reasons:
            _everywhere(True)
            self._manager.reload()  # else it declines steps up to the newest it remembers

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        manager, self._manager = self._manager, None  # its list of steps is no longer to be trusted
        with contextlib.suppress(Exception):
            manager.close()
        self._sweep()
        newest = self.latest_step
        rest = (
            "there is no step yet" if newest is None else f"the newest whole step, {newest}, stands"
        )
        return CheckpointError(
            f"Step {step} could not be saved into {self.folder}: {_cause(error)}; {rest}."
        )

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"it needs {needed:,} bytes and the disk has {free:,} left")

    def _sweep(self) -> None:
        for path in (self.folder / _TRASH, *self.folder.glob(f"*{_UNFINISHED}*")):
            self._remove(path)

    def _remove(self, path: pathlib.Path) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(path, ignore_errors=True)


def _digest(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        return {
            name: text
            for key, value in tree.items()
            for name, text in _flat(value, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: json.dumps(tree, sort_keys=True)}


def _refuse_differences(what: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = _flat(stored), _flat(wanted)
    told = [
        f"  {name}: {old.get(name, '(absent)')} there, {new.get(name, '(absent)')} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if told:
        raise CheckpointError(
            f"{what}:\n" + "\n".join(told) + "\nUse the same settings as before to go on with that "
            "run, or another folder for a new one; nothing was touched."
        )


def _cause(error: BaseException) -> str:
    """What went wrong in one line: orbax buries a full disk under the paths of its files."""
    text = str(error).strip() or type(error).__name__
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text.splitlines()[0][:300]


def _everywhere(ok: bool) -> bool:
    """Whether `ok` holds in every process, which all of them wait for."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
