"""Columns of an alignment: which touch, as attention has it, and as a structure has it."""

import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sequences import SequencesError
from jaxformer.models.encoder import Encoder, attention_maps
from jaxformer.ops import contacts
from jaxformer.typing import Array, Float, Int, PyTree

_APART = 6  # columns from one to the next that counts
_TOUCHING = 8.0  # ångström between the β carbons


def load_distances(name: str, columns: int) -> Float[np.ndarray, "R R"]:
    """Reads `cb_distance` of an npz file, in ångström; NaN where nobody knows.

    Raises:
        SequencesError: If there is none, or not of `columns` columns.
    """
    try:
        with np.load(name) as file:
            distances = file["cb_distance"].astype(np.float32)
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise SequencesError(f"{name}: {error}") from error
    if distances.shape != (columns, columns):
        raise SequencesError(f"{name}: distances of {distances.shape} for {columns} columns")
    return distances


def touching(
    model: Encoder, params: PyTree, rows: Int[np.ndarray, "n T"]
) -> Float[np.ndarray, "R R"]:
    """Scores pairs of columns by how much they look at each other, more than at others.

    That is the mean map of all rows, layers and heads, made symmetric and corrected for what its
    rows and columns have in common.
    """

    @jax.jit
    def draw(params: PyTree, rows: Array) -> Array:
        return attention_maps(model, params, rows).mean(axis=(1, 2)).sum(axis=0)

    total = sum(np.asarray(draw(params, rows[i : i + 32])) for i in range(0, len(rows), 32))
    mean = jnp.asarray(total / len(rows))[1:-1, 1:-1]
    return np.asarray(contacts.average_product_correction(contacts.symmetrize(mean)))


def precision(scores: Float[np.ndarray, "R R"], distances: Float[np.ndarray, "R R"]) -> float:
    """The share of the R best pairs, columns at least 6 apart, that touch; P@L in the field."""
    best = best_pairs(scores, distances)
    return float((distances[best] < _TOUCHING).mean())


def best_pairs(scores: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The R best pairs of those six columns apart or more whose distance is known."""
    i, j = np.triu_indices(len(scores), _APART)
    known = ~np.isnan(distances[i, j])
    i, j = i[known], j[known]
    order = np.argsort(-scores[i, j], kind="stable")[: len(scores)]
    return i[order], j[order]


def draw(
    scores: Float[np.ndarray, "R R"], distances: Float[np.ndarray, "R R"], path: pathlib.Path
) -> None:
    """Draws what touches below the diagonal, and above it the best pairs, right and wrong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, (i, j) = figure.add_subplot(), best_pairs(scores, distances)
    below, left = np.tril_indices(len(scores), -_APART)
    near = distances[below, left] < _TOUCHING
    axes.plot(left[near], below[near], "s", color="0.7", ms=2.5, label="closer than 8 Å")
    right = distances[i, j] < _TOUCHING
    for which, colour, name in ((right, "tab:blue", "right"), (~right, "tab:red", "wrong")):
        axes.plot(j[which], i[which], "s", color=colour, ms=2.5, label=f"{name}: {which.sum()}")
    axes.set(xlim=(0, len(scores)), ylim=(len(scores), 0), xlabel="column", ylabel="column")
    axes.set_aspect("equal")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
