"""What a world model of tokens foresees: the second half of `experiments/token_world.py`."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import ball
from jaxformer.generation import decode, guidance, samplers
from jaxformer.models.decoder import Decoder
from jaxformer.tokenizers.image import ImageTokenizer
from jaxformer.training import pictures, records, run
from jaxformer.typing import Array, Float, Int, PyTree

TESTS = 256
_STRIPS = 3


@functools.partial(jax.jit, static_argnums=(0, 4))
def roll_out(
    model: Decoder,
    params: PyTree,
    seen: Int[Array, "B S"],
    actions: Int[Array, "B T"],
    count: int,
) -> Int[Array, "B T {count}"]:
    """Tells the tokens of T frames, each the likeliest given those before and the actions.

    Args:
        model: Its last tokens are those of the actions.
        params: Of the model.
        seen: Whole moments but for the last one's action.
        actions: Index into `ball.PUSHES`; the first leads from the last frame seen to the first
            told.
        count: Tokens of a frame.
    """
    codes = model.config.vocab_size - len(ball.PUSHES)
    batch, steps = actions.shape

    of_frames = guidance.restricted(
        Partial(model.apply, params), jnp.arange(model.config.vocab_size) < codes
    )

    def tell(cache: Any, prompt: Array) -> tuple[Any, Array]:
        options: Any = {"sample": samplers.greedy(), "key": jax.random.key(0)}
        done = decode.complete(of_frames, cache, prompt, steps=count, **options)
        return done.cache, done.tokens[:, -count:]

    def advance(carry: tuple[Any, Array], action: Array) -> tuple[tuple[Any, Array], Array]:
        cache, last = carry  # a token is read when the next is told, so the last was not yet
        cache, frame = tell(cache, jnp.stack([last, codes + action], axis=1))
        return (cache, frame[:, -1]), frame

    cache = model.empty_cache(batch, seen.shape[1] + steps * (count + 1))
    pushed = jnp.concatenate([seen, codes + actions[:, :1]], axis=1)
    cache, first = tell(cache, pushed)
    _, rest = jax.lax.scan(advance, (cache, first[:, -1]), actions[:, 1:].T)
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


def imagined(
    model: Decoder,
    params: PyTree,
    tokenizer: ImageTokenizer,
    rows: Int[np.ndarray, "B T"],
    actions: Int[np.ndarray, "B T"],
    context: int,
) -> Float[np.ndarray, "B ahead h w 1"]:
    """Draws the frames that follow the first `context` of each row, if these are the actions."""
    moment = rows.shape[1] // actions.shape[1]
    seen = jnp.asarray(rows[:, : context * moment - 1])
    done = jnp.asarray(actions[:, context - 1 : -1])
    ids = np.asarray(roll_out(model, params, seen, done, moment - 1))
    frames = tokenizer.decode(ids.reshape(-1, moment - 1))
    return frames.reshape(*ids.shape[:2], *frames.shape[1:])


def write(
    record: run.Run,
    model: Decoder,
    params: PyTree,
    tokenizer: ImageTokenizer,
    motion: ball.Motion,
    rows: Int[np.ndarray, "B T"],
    settings: dict[str, Any],
) -> None:
    """Writes `report.json`, `error.png`, `rollouts.png` and `loss.png` into the folder of a run."""
    context, folder = settings["context"], record.folder
    frames, actions = np.asarray(motion.frames), np.asarray(motion.actions)
    tell = functools.partial(imagined, model, params, tokenizer, rows, context=context)
    truth = frames[:, context:]
    ids = rows.reshape(*actions.shape, -1)[:, context:, :-1]
    drawn = {
        "predicted": tell(actions),
        "repeated": np.repeat(frames[:, context - 1 : context], truth.shape[1], axis=1),
        "other pushes": tell(np.roll(actions, 1, axis=0)),
        "tokenizer": tokenizer.decode(ids.reshape(-1, ids.shape[-1])).reshape(truth.shape),
    }
    errors = {name: np.square(x - truth).mean(axis=(0, 2, 3, 4)) for name, x in drawn.items()}
    figures = settings | {"horizon": truth.shape[1], "tokens_of_a_frame": ids.shape[-1]}
    figures |= {"vocabulary": tokenizer.vocab_size}
    figures |= {f"mse_{name.replace(' ', '_')}": x.mean() for name, x in errors.items()}
    figures["share_of_repeated"] = errors["predicted"].mean() / errors["repeated"].mean()
    figures["share_at_the_horizon"] = errors["predicted"][-1] / errors["repeated"][-1]
    figures |= {f"mse_{name.replace(' ', '_')}_by_horizon": x for name, x in errors.items()}
    record.report(figures)
    draw_errors(errors, folder / "error.png")
    shown = {"true": truth} | {name: drawn[name] for name in ("predicted", "repeated")}
    draw_rollouts(shown, folder / "rollouts.png")
    lines = records.read_metrics(folder / "metrics.jsonl")
    pictures.loss_curve(lines, folder / "loss.png", unit="nats per token")
    print(records.table({name: x for name, x in figures.items() if np.ndim(x) == 0}))


def draw_errors(errors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draws the mean square error of a pixel over the horizon."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, error in errors.items():
        style = "k--" if name == "tokenizer" else "-"
        axes.plot(np.arange(1, len(error) + 1), error, style, label=name)
    axes.set(xlabel="steps ahead", ylabel="mean square error of a pixel", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_rollouts(shown: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draws every second frame of some flights: what was, and below it what was told."""
    steps = range(1, next(iter(shown.values())).shape[1], 2)
    rows = [x[flight, 1::2] for flight in range(_STRIPS) for x in shown.values()]
    pictures.image_grid(
        np.stack(rows), path, [*shown] * _STRIPS, [f"+{step + 1}" for step in steps]
    )
