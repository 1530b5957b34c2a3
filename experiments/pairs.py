"""Pairs of texts: where they come from, and how good is what a model writes for the first."""

import dataclasses
import functools
import importlib
import pathlib
import string
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.texts import content
from jaxformer.generation.beam import beam_search
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.ops import attention
from jaxformer.tokenizers import bpe, plain
from jaxformer.typing import Array, Int, PyTree


class PairsError(ValueError):
    """Pairs of texts cannot be read, there are too few, or a package is missing."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sources with translations, and what cuts them; the start and the end are two tokens more.

    Attributes:
        train: A source and its translation each.
        tests: A source and one or several translations each.
        tokenizer: Of both languages.
    """

    train: Sequence[tuple[str, ...]]
    tests: Sequence[tuple[str, ...]]
    tokenizer: Any

    @property
    def start(self) -> int:
        """The token before a translation; the one after it is the next."""
        return self.tokenizer.vocab_size

    def cut(
        self, texts: Sequence[str], longest: int
    ) -> tuple[Int[np.ndarray, "B {longest}"], Int[np.ndarray, "B"]]:
        """Tokens of each text, `longest` at most, filled up with the end, and how many they are."""
        rows = [row[:longest] for row in self.tokenizer.encode_batch(texts)]
        filled = [[*row] + [self.start + 1] * (longest - len(row)) for row in rows]
        return np.array(filled, np.int32), np.array([len(row) for row in rows], np.int32)

    def text(self, tokens: Int[np.ndarray, "T"]) -> str:
        """What tokens say."""
        return self.tokenizer.decode([int(token) for token in tokens if token < self.start])


def load(name: str, vocab_size: int = 0, *, tests: int = 1000, least: int = 1) -> Pairs:
    """Reads pairs and makes a tokenizer of those to learn from.

    Args:
        name: "embedded": strings of 4 to 12 letters and the same backwards; a file of lines, as it
            is or with `.gz`, of which the last tenth are tests; or a folder of `*train*.tsv*` and
            `*test*.tsv*`. A line is a source, a tab and its translation, perhaps more of them.
        vocab_size: Of a byte-level BPE; 0 for characters.
        tests: How many there are at most.
        least: Pairs that there must be to learn from.

    Raises:
        PairsError: If they cannot be read, are too few, or sacrebleu is missing.
    """
    try:
        if name == "embedded":
            train, others = _strings()
        else:
            importlib.import_module("sacrebleu")
            train, others = _read(pathlib.Path(name).expanduser())
        train = [(source, other) for source, *translations in train for other in translations]
        if len(train) < least or not others:
            raise ValueError(f"{len(train)} pairs to learn from, {len(others)} to be judged by")
        texts = [text for pair in train for text in pair]
        made: Any = bpe.train(texts, vocab_size=vocab_size) if vocab_size else None
        return Pairs(train, others[:tests], made or plain.Characters.train(texts, unknown="?"))
    except ModuleNotFoundError as error:
        told = f"BLEU needs the package {error.name}: pip install 'jaxformer[data]'"
        raise PairsError(told) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise PairsError(f"{name}: {error}") from error


def _strings() -> tuple[Any, Any]:
    random, letters = np.random.default_rng(0), np.array([*string.ascii_lowercase])
    drawn = ("".join(random.choice(letters, n)) for n in random.integers(4, 13, 21_000))
    rows = [(text, text[::-1]) for text in dict.fromkeys(drawn)]
    return rows[:20_000], rows[20_000:]


def _read(path: pathlib.Path) -> tuple[Any, Any]:
    if path.is_dir():
        parts = (sorted(path.glob(f"*{part}*.tsv*")) for part in ("train", "test"))
        train, tests = ([row for file in files for row in _lines(file)] for files in parts)
        return train, tests
    rows = _lines(path)
    return rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]


def _lines(path: pathlib.Path) -> list[tuple[str, ...]]:
    rows = [tuple(line.split("\t")) for line in content(path).decode().splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not all(row):
            raise ValueError(f"line {number} of {path.name} is no source, tab and translation")
    return rows


def write(
    model: EncoderDecoder, params: PyTree, pairs: Pairs, longest: int, beams: int, rows: int = 125
) -> list[str]:
    """Writes the likeliest translation of each test's source that so many beams find."""
    end = pairs.start + 1

    @jax.jit
    def search(params: PyTree, source: Array, lengths: Array) -> Array:
        cache: Any = model.apply(
            params,
            source,
            attention.key_lengths(lengths),
            max_length=longest + 1,
            method="begin",
        )
        step: Any = functools.partial(model.apply, params, method="step")
        start = jnp.full((len(source), 1), pairs.start)
        found = beam_search(
            step, cache, start, steps=longest + 1, num_beams=beams, stop=end, pad=end
        )
        return found.tokens[:, 0]

    written = []
    sources = [row[0] for row in pairs.tests]
    for first in range(0, len(sources), rows):
        part = sources[first : first + rows]
        filled = part + part[:1] * (rows - len(part))  # so that one program serves all
        tokens = np.asarray(search(params, *map(jnp.asarray, pairs.cut(filled, longest))))
        written += map(pairs.text, tokens[: len(part)])
    return written


def figures(pairs: Pairs, written: Sequence[str], *, bleu: bool) -> dict[str, float]:
    """The share that is written exactly as one of the translations, and BLEU."""
    exact = np.mean([text in row[1:] for text, row in zip(written, pairs.tests, strict=True)])
    if not bleu:
        return {"exact": float(exact)}
    most = max(map(len, pairs.tests))
    columns = [[row[i] if i < len(row) else None for row in pairs.tests] for i in range(1, most)]
    score = importlib.import_module("sacrebleu").corpus_bleu(list(written), columns)
    return {"exact": float(exact), "bleu": score.score}


def draw_attention(
    model: EncoderDecoder, params: PyTree, pairs: Pairs, text: str, longest: int, path: pathlib.Path
) -> None:
    """Draws which tokens of the first test's source the last block looked at as it wrote a text."""
    from matplotlib.figure import Figure

    (source, _), (target, _) = (pairs.cut([x], longest) for x in (pairs.tests[0][0], text))
    source, target = (x[0, x[0] < pairs.start] for x in (source, target))
    before = np.concatenate([[pairs.start], target])
    look = jax.jit(lambda *given: model.apply(*given, mutable=["attention"])[1])
    seen = look(params, jnp.asarray(source)[None], jnp.asarray(before)[None])
    layers = model.config.decoder_layers or model.config.num_layers
    last = seen["attention"]["blocks"][f"layers_{layers - 1}"]["cross"]["inner"]["weights"][0]
    read, written = ([pairs.text(x[None]).strip() or "␣" for x in row] for row in (source, target))
    figure = Figure(figsize=(5.5, 5.0), layout="constrained")
    axes = figure.add_subplot(xlabel="read", ylabel="written")
    axes.imshow(np.asarray(last).mean((0, 1)), cmap="gray_r", vmin=0)
    axes.set_xticks(range(len(source)), read, rotation=90)
    axes.set_yticks(range(len(before)), [*written, "end"])
    figure.savefig(path, dpi=130)
