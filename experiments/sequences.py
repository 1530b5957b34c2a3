"""Sequences to hide tokens of: where they come from, and how well they are guessed."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib.stride_tricks import sliding_window_view

from experiments import texts
from jaxformer.models.encoder import Encoder
from jaxformer.ops import attention, losses, masking
from jaxformer.tokenizers import alphabets
from jaxformer.training.step import place
from jaxformer.typing import Array, Bool, Float, Int, Key, PyTree

_DRAWS = 4  # of hidden tokens in each row that is for validation


class SequencesError(ValueError):
    """Sequences cannot be read, or there are too few."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens in rows of one length.

    Attributes:
        train: What to learn from.
        valid: What to be judged by, each by its name.
        shares: How frequent each of the V tokens is in `train`, those never hidden left out.
        mask_token: What hides a token.
        special: Tokens that are never hidden, the mask among them.
        pad: Token that fills rows up; None if all are full.
        number: Of what is learned from, the same for the same.
    """

    train: Int[np.ndarray, "n T"]
    valid: Mapping[str, Int[np.ndarray, "_ T"]]
    shares: Float[np.ndarray, "V"]
    mask_token: int
    special: Sequence[int]
    pad: int | None
    number: int

    def hide(self, key: Key[Array, ""], tokens: Array, rate: float) -> masking.Masked:
        """Chooses tokens to be guessed, as BERT does."""
        options = {"vocab_size": len(self.shares), "mask_token": self.mask_token, "rate": rate}
        return masking.mask_tokens(key, tokens, special=self.special, **options)

    def guess(
        self, model: Encoder, params: PyTree, tokens: Array, hidden: masking.Masked, **options: Any
    ) -> tuple[Array, Array, Bool[Array, "B T"]]:
        """Guesses all chosen tokens: nats, which are right, and the chosen themselves."""
        mask = None
        if self.pad is not None:
            mask = attention.key_lengths((tokens != self.pad).sum(axis=1))
        logits: Any = model.apply(params, hidden.tokens, mask, method="logits", **options)
        nats = losses.cross_entropy(logits, tokens, where=hidden.chosen)
        return nats, hidden.chosen & (logits.argmax(axis=-1) == tokens), hidden.chosen


def load_text(names: Sequence[str], vocab_size: int, length: int) -> Rows:
    """All windows of `length` tokens of a text, and those of its last tenth side by side.

    Raises:
        TextError: If a text cannot be read or is too short.
    """
    text = texts.load(names, vocab_size, least=length)
    mask, whole = text.tokenizer.vocab_size, len(text.valid) // length * length
    valid = {"validation": text.valid[:whole].reshape(-1, length)}
    shares = _shares(text.train, mask + 1, (mask,))
    windows, number = sliding_window_view(text.train, length), zlib.crc32(text.train.tobytes())
    return Rows(windows, valid, shares, mask, (mask,), None, number)


def load_proteins(names: Sequence[str], valid: Sequence[str], length: int) -> Rows:
    """Proteins of FASTA files, long ones in pieces, as ESM's tokens.

    Args:
        names: Files to learn from, as they are or with `.gz`.
        valid: Files to be judged by; none for every tenth protein of the others.
        length: Of a row: a start, residues, an end, padding.

    Raises:
        SequencesError: If a file cannot be read, there is no protein, or two files that are judged
            by have one name.
    """
    learned = [protein for name in names for protein in _fasta(name)]
    judged = {pathlib.Path(name.removesuffix(".gz")).stem: _fasta(name) for name in valid}
    if len(judged) < len(valid):
        raise SequencesError(f"{' '.join(valid)}: two files of one name")
    if not valid:
        learned, judged["validation"] = _apart(learned, 10)
    if not learned or not all(judged.values()):
        files = " ".join([*names, *valid])
        raise SequencesError(f"{files}: expected proteins, ten at least if all are of one kind")
    alphabet = alphabets.protein(unknown="<unk>", fold_case=True)

    def rows(proteins: Sequence[str]) -> Int[np.ndarray, "n T"]:
        size = length - 2
        pieces = [p[i : i + size] for p in proteins for i in range(0, len(p), size)]
        return alphabet.encode_framed(pieces, length=length)[0]

    return _of_proteins(rows(learned), {name: rows(some) for name, some in judged.items()}, pad=1)


def load_alignment(names: Sequence[str], *, shuffle: bool, seed: int) -> Rows:
    """Aligned proteins, one a line, every twentieth for validation.

    Args:
        names: Files, as they are or with `.gz`.
        shuffle: Deals each column anew to the sequences, so that none tells of another.
        seed: Of that.

    Raises:
        SequencesError: If a file cannot be read, or its lines are not of one length.
    """
    lines = [line for name in names for line in _read(name).split()]
    if len({len(line) for line in lines}) != 1 or len(lines) < 20:
        raise SequencesError(f"{' '.join(names)}: expected 20 sequences or more, of one length")
    alphabet = alphabets.protein(unknown="<unk>")
    rows = alphabet.encode_framed(lines)[0]
    if shuffle:
        rows = np.random.default_rng(seed).permuted(rows, axis=0)
    train, valid = map(np.array, _apart(rows, 20))
    return _of_proteins(train, {"validation": valid}, pad=None)


def make_judge(
    model: Encoder, rows: Rows, rate: float, devices: Mesh
) -> Callable[[PyTree, Int[np.ndarray, "n T"]], dict[str, float]]:
    """Makes a function of parameters and rows: nats a hidden token, and the share guessed right.

    Each row is read several times; what is hidden is the same at every call.
    """
    guess = jax.jit(functools.partial(rows.guess, model))
    size = 32 * devices.shape["data"]

    def judge(params: PyTree, tokens: Int[np.ndarray, "n T"]) -> dict[str, float]:
        found = np.zeros(3)
        for draw in range(_DRAWS):
            hidden = rows.hide(jax.random.key(draw), jnp.asarray(tokens), rate)
            full = [np.pad(x, ((0, -len(x) % size), (0, 0))) for x in (tokens, *hidden)]
            for start in range(0, len(full[0]), size):
                part, *shown = (place(x[start : start + size], devices) for x in full)
                told = guess(params, part, masking.Masked(*shown))
                found += [np.asarray(x).sum(dtype=np.float64) for x in told]
        return {"nats": found[0] / found[2], "right": found[1] / found[2]}

    return judge


def chance(rows: Rows, tokens: Int[np.ndarray, "n T"]) -> float:
    """Nats a token for who knows how frequent each is in training, and nothing else."""
    counts = np.bincount(tokens.reshape(-1), minlength=len(rows.shares))
    counts[[*rows.special]] = 0
    counted = counts > 0
    return float(-counts[counted] @ np.log(rows.shares[counted]) / counts.sum())


def _of_proteins(
    train: Int[np.ndarray, "n T"], valid: Mapping[str, Int[np.ndarray, "_ T"]], pad: int | None
) -> Rows:
    special = (*range(4), *range(24, 33))  # letters that are no amino acid, gaps too
    number = zlib.crc32(train.tobytes())
    return Rows(train, valid, _shares(train, 33, special), 32, special, pad, number)


def _shares(tokens: np.ndarray, size: int, special: Sequence[int]) -> Float[np.ndarray, "V"]:
    counts = np.bincount(tokens.reshape(-1), minlength=size) + 1.0  # so that none is impossible
    counts[[*special]] = 0
    return counts / counts.sum()


def _apart(items: Any, every: int) -> tuple[list, list]:
    """All items but the last of each so many, and these."""
    return [x for i, x in enumerate(items, 1) if i % every], [*items[every - 1 :: every]]


def _read(name: str) -> str:
    try:
        return texts.content(pathlib.Path(name).expanduser()).decode("ascii")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SequencesError(f"{name}: {error}") from error


def _fasta(name: str) -> list[str]:
    """The sequences of a FASTA file: what stands between two lines that begin with ">"."""
    before, *records = "\n".join(["", *_read(name).splitlines()]).split("\n>")
    if before.strip():
        raise SequencesError(f"{name}: expected FASTA, whose first line begins with '>'")
    found = ("".join(record.split("\n")[1:]).replace(" ", "") for record in records)
    return [sequence for sequence in found if sequence]
