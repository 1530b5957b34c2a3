"""Loads and saves a model as a folder that Hugging Face transformers reads and writes."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxformer.interop import tensors
from jaxformer.interop.families import MODULES, Family, family
from jaxformer.interop.rules import Rule
from jaxformer.interop.settings import Settings
from jaxformer.typing import DTypeLike, PyTree

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    sharding: Sharding | None = None,
) -> tuple[nn.Module, PyTree]:
    """Reads a checkpoint.

    Tensors are read one parameter at a time, each of which goes to its devices before the next is
    read.

    Args:
        folder: With `config.json` and one or several safetensors files.
        dtype: Of the parameters; that of the files if None.
        sharding: Where the parameters go: for all the same, or for each by its path ("embed/table")
            and shape; the default device if None.

    Returns:
        The model and its variables, for `model.apply(params, tokens)`, or images in their place.

    Raises:
        FileNotFoundError: If the folder, its config or a file of tensors does not exist.
        ValueError: If the config has a setting or a value that is not supported, a file is broken,
            tensors are missing, surplus, of another shape than the config says, or hold NaN.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    settings = Settings.read(folder)
    kind = family(settings.take("model_type"), settings.where)
    config = kind.read(settings)
    settings.finish()
    files = tensors.Tensors(folder)
    config = kind.amend(config, files)
    model = kind.model(config)
    shapes = parameter_shapes(kind, model)
    rules = match(kind, list(kind.rules(config)), files)
    params, wrong = {}, []
    for rule in rules:
        try:
            x = rule.take([files.read(name) for name in rule.theirs])
            if x.shape != shapes[rule.ours].shape:
                raise ValueError(f"{rule.theirs[0]} makes {x.shape}, not {shapes[rule.ours].shape}")
        except ValueError as error:
            if "NaN" in str(error) or "cannot be read" in str(error):
                raise
            wrong.append(str(error))
            continue
        x = np.asarray(x, dtype or x.dtype)
        placed = jax.device_put(x, _place(sharding, rule.ours, x.shape))
        params[rule.ours] = jax.block_until_ready(placed)
        del x
    if wrong:
        raise ValueError(f"{folder}: tensors of another shape than config.json says: {wrong}.")
    return model, {"params": traverse_util.unflatten_dict(params, sep="/")}


def save(
    model: nn.Module,
    params: PyTree,
    folder: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> None:
    """Writes a checkpoint that `load` and transformers read; the folder appears when it is whole.

    Args:
        model: With a `config` that some architecture can say.
        params: Its variables.
        folder: Must not exist, or be empty.
        model_type: The architecture to save as; the first that can say the config if None.
        shard_bytes: Size at which the next file begins.

    Raises:
        FileExistsError: If the folder holds anything.
        ValueError: If no architecture can say the config, or the parameters are not the model's.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already.")
    kind, settings = _speaker(model, model_type)
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    rules = {rule.ours: rule for rule in kind.rules(model.config)}  # pyright: ignore[reportAttributeAccessIssue]
    shapes = parameter_shapes(kind, model)
    if wrong := [name for name in {*flat} ^ {*rules}]:
        raise ValueError(f"these are no parameters of the model, or are missing: {sorted(wrong)}.")
    made: dict[str, np.ndarray] = {}
    for name, rule in rules.items():
        x = np.asarray(flat[name])
        if x.shape != shapes[name].shape:
            raise ValueError(f"{name} has shape {x.shape}, the model's is {shapes[name].shape}.")
        made |= dict(zip(rule.theirs, rule.give(x), strict=True))
    dtype = jnp.dtype(next(iter(flat.values())).dtype).name
    head = {"architectures": [kind.architecture], "model_type": kind.model_type, "dtype": dtype}
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        text = json.dumps(head | settings, indent=2, sort_keys=True)
        (draft / "config.json").write_text(text + "\n", encoding="utf-8")
        tensors.write(draft, made, shard_bytes)
        draft.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def parameter_shapes(kind: Family, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path, without making them."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    init = functools.partial(model.init, method=kind.method(config))
    made = jax.eval_shape(init, jax.random.key(0), *kind.example(config))
    flat: Any = traverse_util.flatten_dict(made["params"], sep="/")
    return flat


def match(kind: Family, rules: list[Rule], files: tensors.Tensors) -> list[Rule]:
    """The rules with the names that the files have, which must be just those."""
    places = {_renamed(kind, name): name for name in files.names()}
    names = {*places}
    wanted = [name for rule in rules for name in rule.theirs]
    bare = kind.prefix and not any(name.startswith(kind.prefix) for name in names)

    def named(name: str) -> str:
        return name.removeprefix(kind.prefix) if bare else name

    given = {named(name) for name in wanted}
    unused = re.compile("|".join(kind.unused) or "$^")
    surplus = {name for name in names - given if not unused.fullmatch(name)}
    for one, other in kind.tied:
        one, other = named(one), named(other)
        if one in surplus and other in names:
            if not np.array_equal(files.read(places[one]), files.read(places[other])):
                raise ValueError(
                    f"{files.place(places[one])}: {one} is not {other}, though they are tied."
                )
            surplus.discard(one)
    missing = {named(name) for rule in rules if not rule.optional for name in rule.theirs} - names
    if missing or surplus:
        said = [f"missing: {sorted(missing)}"] * bool(missing)
        said += [f"surplus: {sorted(surplus)}"] * bool(surplus)
        raise ValueError(f"{files.folder}: the tensors are not the model's; {'; '.join(said)}.")

    def there(rule: Rule) -> tuple[str, ...]:
        return tuple(places[name] for name in map(named, rule.theirs) if name in names)

    return [dataclasses.replace(rule, theirs=there(rule)) for rule in rules]


def _renamed(kind: Family, name: str) -> str:
    for pattern, other in kind.renamed:
        name = re.sub(pattern, other, name)
    return name


def _place(sharding: Sharding | None, path: str, shape: tuple[int, ...]) -> Any:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    return sharding(path, shape)


def _speaker(model: nn.Module, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """An architecture whose settings say just what the model's config says."""
    config = getattr(model, "config", None)
    for name in MODULES if model_type is None else [model_type]:
        kind = family(name, "save")
        try:
            if config is None or type(kind.model(config)) is not type(model):
                continue
            settings = kind.write(config)
            again = Settings(settings)
            if kind.read(again) == kind.told(config):
                again.finish()
                return kind, settings
        except (ValueError, KeyError, AttributeError, TypeError, AssertionError):
            continue
    known = [*MODULES] if model_type is None else model_type
    raise ValueError(f"{known} cannot say what the model's config says: {config}.")
