"""What a world model of vectors foresees: the second half of `experiments/jepa_world.py`.

Ridge regression reads the ball's state from the last `READ` vectors. It is fitted to vectors that
the teacher gives to true frames, and then reads what was told without any.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import ball
from experiments.latent_world import LatentWorld, dream, encode
from jaxformer.analysis import representation
from jaxformer.training import pictures, records, run
from jaxformer.typing import Float, PyTree

READ = 4
FAR = 20
_TESTS = 512
_STRIP = (0, 4, 8, 12, 16, 20)

Vectors = Float[np.ndarray, "B T D"]
States = Float[np.ndarray, "B T 4"]


def unseen_flights(box: ball.Box, context: int, seed: int, count: int = _TESTS) -> ball.Motion:
    """Draws flights that are none of those in training."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.device_get(ball.sequences(key, count, context + FAR, box=box))


def rollouts(
    model: LatentWorld,
    student: PyTree,
    teacher: PyTree,
    flights: ball.Motion,
    context: int,
    seed: int,
) -> dict[str, Vectors]:
    """Gives a vector to each moment of each flight, in three ways.

    Returns:
        "seen", the teacher's vectors of the true frames; and those told from the student's of the
        first `context` frames by "JEPA", and by a "random" predictor that was never trained.
    """
    frames = jnp.asarray(flights.frames)
    start = encode(model, student, frames[:, :context])
    fresh = model.init(jax.random.fold_in(jax.random.key(seed), 2), frames[:1, :context])
    told = {"JEPA": dream(model, student, start, FAR), "random": dream(model, fresh, start, FAR)}
    joined = {name: np.concatenate([start, ahead], axis=1) for name, ahead in told.items()}
    return {"seen": np.asarray(encode(model, teacher, frames)), **joined}


def read(
    told: dict[str, Vectors], states: States, context: int
) -> dict[str, Float[np.ndarray, "B horizon 4"]]:
    """Reads the second half of the flights, from the last frame seen to `FAR` steps after it.

    A fourth way, "persistence", stays with what is read from the last frames seen.
    """
    half = len(states) // 2
    seen = _windows(told["seen"][:half])
    truth = states[:half, READ - 1 :]
    probe = representation.fit_ridge(*(x.reshape(-1, x.shape[-1]) for x in (seen, truth)))
    start = context - READ
    found = {name: probe(_windows(x[half:])[:, start:]) for name, x in told.items()}
    found["persistence"] = np.repeat(found["JEPA"][:, :1], FAR + 1, axis=1)
    return found


def explained(
    found: Float[np.ndarray, "B horizon 4"], truth: Float[np.ndarray, "B horizon 4"]
) -> Float[np.ndarray, "2 horizon"]:
    """Computes R² at each horizon: of the position, and of the velocity; 0 for the mean's guess."""
    share = 1 - np.square(found - truth).mean(axis=0) / truth.var(axis=0)
    return share.reshape(-1, 2, 2).mean(axis=-1).T


def write(
    record: run.Run,
    told: dict[str, Vectors],
    flights: ball.Motion,
    context: int,
    settings: dict[str, Any],
) -> None:
    """Writes `report.json`, `r2.png`, `strip.png` and `loss.png` into the folder of a run."""
    folder = record.folder
    frames, states = np.asarray(flights.frames), np.asarray(flights.states)
    found = read(told, states, context)
    truth = states[len(states) // 2 :, context - 1 :]
    curves = {name: explained(x, truth) for name, x in found.items()}
    vectors = told["seen"].reshape(-1, told["seen"].shape[-1])
    figures = settings | {"context": context, "horizon": FAR, "vector": vectors.shape[1]}
    figures["rank"] = representation.effective_rank(vectors)
    for name, (position, velocity) in curves.items():
        figures |= {f"{name}_position": position[-1], f"{name}_velocity": velocity[-1]}
        figures |= {f"{name}_position_by_horizon": position}
    error = np.hypot(*(found["JEPA"] - truth)[:, -1, :2].T)
    figures["JEPA_median_error_in_pixels"] = float(np.median(error))
    record.report(figures)
    draw_curves(curves, folder / "r2.png")
    draw_strip(frames[len(states) // 2 :, context - 1 :], found, folder / "strip.png")
    rows = records.read_metrics(folder / "metrics.jsonl")
    pictures.loss_curve(rows, folder / "loss.png", unit="loss")
    print(records.table({name: x for name, x in figures.items() if np.ndim(x) == 0}))


def draw_curves(curves: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draws R² over the horizon, of the position and of the velocity."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, title, row in zip(figure.subplots(1, 2), ("position", "velocity"), (0, 1)):
        for name, curve in curves.items():
            style = "k--" if name == "seen" else "-"
            axes.plot(curve[row], style, label="true frames" if name == "seen" else name)
        axes.set(title=title, xlabel="steps ahead", ylim=(-1.1, 1.05), xticks=range(0, FAR + 1, 5))
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("R² of a linear probe")
    figure.axes[1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_strip(
    frames: Float[np.ndarray, "B horizon h w 1"],
    found: dict[str, np.ndarray],
    path: pathlib.Path,
    rows: int = 4,
) -> None:
    """Draws true frames of some flights, and in each where the vectors say that the ball is."""
    figure = Figure(figsize=(1.5 * len(_STRIP), 1.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, len(_STRIP), squeeze=False)
    side = frames.shape[2]
    marks = {"JEPA": {"marker": "+", "color": "tab:red"}}
    marks["persistence"] = {"marker": "x", "color": "tab:blue"}
    for (row, column), axes in np.ndenumerate(grid):
        step = _STRIP[column]
        axes.imshow(
            frames[row, step, ..., 0], cmap="gray", vmin=0, vmax=1, extent=(0, side, side, 0)
        )
        for name, style in marks.items():
            axes.scatter(*found[name][row, step, :2], s=90, label=name, **style)
        axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
        if row == 0:
            axes.set_title(f"{step} steps ahead" if step else "last seen", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def _windows(vectors: Vectors) -> Float[np.ndarray, "B T READ*D"]:
    """Puts each vector beside the `READ` - 1 before it."""
    last = vectors.shape[1] - READ + 1
    return np.concatenate([vectors[:, i : i + last] for i in range(READ)], axis=-1)
