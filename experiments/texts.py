"""Texts: where they come from, how surprising they are to a model, and how it goes on with them."""

import dataclasses
import functools
import gzip
import importlib
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from jaxformer.generation import decode, samplers
from jaxformer.models.decoder import Decoder
from jaxformer.ops import losses
from jaxformer.tokenizers import bpe, plain
from jaxformer.training.step import place
from jaxformer.typing import Array, Int, PyTree


class TextError(ValueError):
    """A text cannot be read, or is too short."""


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a text: of the first nine tenths of its characters, and of the rest.

    Attributes:
        train: What to learn from.
        valid: What to be judged by.
        tokenizer: Loses nothing of either. Characters are those of the whole text; merges are
            learned from the training text alone.
    """

    train: Int[np.ndarray, "train"]
    valid: Int[np.ndarray, "valid"]
    tokenizer: Any


def load(names: Sequence[str], vocab_size: int = 0, *, least: int = 1) -> Text:
    """Reads texts, joins them, and cuts the whole into tokens.

    Args:
        names: Each is one of
            `embedded`: the language reference that comes with Python, each paragraph once;
            `tfds:DIR`: Tiny Shakespeare prepared by tensorflow-datasets, its three splits joined;
            a file of UTF-8, as it is or with `.gz`.
        vocab_size: Of a byte-level BPE; 0 for characters.
        least: Tokens that there must be to learn from, and as many to be judged by.

    Raises:
        TextError: If a text cannot be read, is too short, or `vocab_size` is less than 256.
    """
    try:
        text = "".join(map(_read, names))
        if not text:
            raise ValueError("the text is empty")
        parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
        if vocab_size:
            tokenizer: Any = bpe.train(parts[:1], vocab_size=vocab_size)
        else:
            tokenizer = plain.Characters.train([text])
        train, valid = map(tokenizer.encode_array, parts)
        if min(len(train), len(valid)) < least:
            raise ValueError(
                f"there are {len(train)} tokens to learn from and {len(valid)}, of the last tenth, "
                f"to be judged by, and of each there must be {least}"
            )
        return Text(train, valid, tokenizer)
    except (OSError, EOFError, ValueError, zlib.error, ModuleNotFoundError) as error:
        raise TextError(f"{' '.join(names)}: {error}") from error


def _read(name: str) -> str:
    if name == "embedded":
        told = (part for topic in sorted(topics.topics.items()) for part in topic[1].split("\n\n"))
        return "\n\n".join(dict.fromkeys(part.strip("\n") for part in told))
    path = pathlib.Path(name.removeprefix("tfds:")).expanduser()
    if name.startswith("tfds:"):
        return _read_tfds(path)
    if not path.is_file():
        raise FileNotFoundError("no such file; expected 'embedded', 'tfds:DIR' or files of text")
    return content(path).decode()


def content(path: pathlib.Path) -> bytes:
    """What a file holds, unpacked if its name ends with `.gz`."""
    packed = path.read_bytes()
    return gzip.decompress(packed) if path.suffix == ".gz" else packed


def _read_tfds(path: pathlib.Path) -> str:
    found = [*path.glob("dataset_info.json"), *path.glob("tiny_shakespeare/*/dataset_info.json")]
    if not found:
        raise FileNotFoundError("expected a folder with tiny_shakespeare/1.0.0/dataset_info.json")
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        importlib.import_module("importlib_resources")  # it needs both, and declares neither
        importlib.import_module("PIL")
    except ModuleNotFoundError as error:
        told = f"needs the package {error.name}: pip install 'jaxformer[data]'"
        raise ModuleNotFoundError(told) from error
    try:
        builder = tfds.builder_from_directory(found[-1].parent)
        splits = map(builder.as_data_source, ("train", "validation", "test"))
        return b"".join(record["text"] for split in splits for record in split).decode()
    except Exception as error:
        raise ValueError(f"expected Tiny Shakespeare in array_record files: {error}") from error


def make_reader(model: Decoder, context: int, devices: Mesh) -> Callable[..., float]:
    """Makes a function of parameters, tokens before, tokens and stride: the nats of the tokens.

    A window makes `context` predictions, of which the last `stride` count, and the next window is
    `stride` further on: every token is predicted once, from `context - stride` tokens and more.
    The first ones have the end of the tokens before, of which there must be as many.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def score(params: PyTree, windows: Array, stride: int) -> Array:
        logits: Any = model.apply(params, windows[:, :-1])
        return losses.cross_entropy(logits[:, -stride:], windows[:, -stride:])

    def read(
        params: PyTree,
        before: Int[np.ndarray, "before"],
        tokens: Int[np.ndarray, "n"],
        stride: int,
    ) -> float:
        rows = 32 * devices.shape["data"]
        starts = stride * np.arange(math.ceil(len(tokens) / stride / rows) * rows)
        known = np.concatenate([before[stride - context - 1 :], tokens])
        padded = np.pad(known, (0, starts[-1] + context + 1 - len(known)))
        windows = sliding_window_view(padded, context + 1)[starts]
        parts = [place(windows[i : i + rows], devices) for i in range(0, len(windows), rows)]
        nats = [jax.device_get(score(params, part, stride)) for part in parts]
        return float(np.concatenate(nats).reshape(-1)[: len(tokens)].sum(dtype=np.float64))

    return read


def figures(text: Text, context: int, read: Callable[[int], float]) -> dict[str, float]:
    """What a report says of a text.

    Args:
        text: Its validation tokens are what was read.
        context: T.
        read: The nats of all of them, by the stride between windows.
    """
    nats, apart, octets = read(context // 4), read(context), text.tokenizer.decode_bytes(text.valid)
    return {
        "vocabulary": text.tokenizer.vocab_size,
        "training_tokens": len(text.train),
        "validation_tokens": len(text.valid),
        "nats_per_token": nats / len(text.valid),
        "nats_per_token_in_separate_windows": apart / len(text.valid),
        "nats_per_character": nats / len(octets.decode()),
        "bits_per_byte": nats / len(octets) / math.log(2),
    }


def write(
    model: Decoder, params: PyTree, start: Int[np.ndarray, "n"], context: int, seed: int
) -> Int[np.ndarray, "3 m"]:
    """Goes on from the end of `start` three times, for four windows, each half from the one before.

    So no place is further from the first than in training. Drawn at temperature 0.8.
    """
    half = context // 2

    @jax.jit
    def go_on(params: PyTree, tokens: Array, key: Array) -> Array:
        cache = model.empty_cache(len(tokens), 2 * half)
        step: Any = functools.partial(model.apply, params)
        sample = samplers.sampler(temperature=0.8)
        return decode.generate(step, cache, tokens, steps=half, sample=sample, key=key)[:, half:]

    parts = [jnp.tile(jnp.asarray(start[-half:]), (3, 1))]
    for key in jax.random.split(jax.random.key(seed), 8):
        parts.append(go_on(params, parts[-1], key))
    return np.concatenate(parts, axis=1)
