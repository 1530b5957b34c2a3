"""Learns how a ball moves without drawing it: a JEPA that is rolled forward in its own vectors.

    python -m experiments.jepa_world          seven minutes of one core's time

A ViT turns each frame into a vector. A causal Transformer reads the last vectors and tells the
next, then reads what it told, and so on, and never sees the frames it speaks of. It is trained to
tell the vectors that a slow average of the ViT, its teacher, gives to the frames to come; a term
for variance and one for covariance keep these vectors apart. What the vectors know is read by ridge
regression, fitted to vectors of frames that were seen. The same command goes on where it was
stopped.

Share of the variance that is explained 20 steps after the last of six frames, three seeds:

                      position           velocity
    JEPA           0.980 ± 0.006      0.80 ± 0.06
    random          -4.9 ± 2           -20 ± 20      the same encoder, a predictor as it is drawn
    persistence    -1.07 ± 0.14      -0.63 ± 0.14    what is read from the last frames seen
    seen           0.994 ± 0.002      0.85 ± 0.04    what the probe reads from true frames

Half as many steps give 0.93 ± 0.03 of the position.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import ball, command
from experiments import jepa_world_report as report
from experiments.latent_world import LatentWorld, LatentWorldConfig, dream, encode
from jaxformer.analysis import representation
from jaxformer.ops import spreading
from jaxformer.training import data, ema, loop, mesh, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step
from jaxformer.typing import Array, PyTree

_LEAST_RANK = 0.2  # of the way to all of the vectors' channels; two numbers say where the ball is


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        run: Folder of the run; a run that was stopped goes on from its last checkpoint.
        model: Sizes of the model.
        box: Where the ball flies; the model settles `side`.
        context: Frames that are seen, and vectors that the predictor reads.
        ahead: Steps that are predicted in training.
        variance: Weight of the variance term.
        covariance: Weight of the covariance term.
        teacher: Share of itself that the teacher keeps at each step; rises to 1.
        flights: Different ones to learn from.
        steps: Training steps.
        batch: Flights a step.
        learning_rate: Peak, for Muon: of the hidden matrices.
        adam_learning_rate: Peak, for AdamW: of everything else.
        warmup: Steps to the peak.
        seed: Of everything random.
        mesh: Devices, such as "data=8"; simulated on a CPU. By default all that divide the batch.
        save_every: Steps between checkpoints, and between looks at the rank of the vectors.
        log_every: Steps between lines.
    """

    run: str = "runs/jepa_world"
    model: LatentWorldConfig = LatentWorldConfig()
    box: ball.Box = ball.Box()
    context: int = 6
    ahead: int = 16
    variance: float = 1.0
    covariance: float = 0.04
    teacher: float = 0.97
    flights: int = 16_384
    steps: int = 1600
    batch: int = 64
    learning_rate: float = 0.02
    adam_learning_rate: float = 0.002
    warmup: int = 50
    seed: int = 0
    mesh: str | None = None
    save_every: int = 100
    log_every: int = 20

    def __post_init__(self) -> None:
        run.check_least(
            self, context=report.READ, ahead=1, steps=2, batch=2, save_every=1, log_every=1
        )
        if not 0 <= self.teacher <= 1:
            raise ValueError(f"teacher must lie in [0, 1], got {self.teacher}.")
        if self.batch > self.flights:
            raise ValueError(f"batch={self.batch} exceeds flights={self.flights}.")
        if self.box.side != self.model.side:
            object.__setattr__(self, "box", dataclasses.replace(self.box, side=self.model.side))

    def meaning(self) -> dict[str, Any]:
        """The settings that the numbers of a checkpoint depend on."""
        how = ("run", "mesh", "save_every", "log_every")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in how}


def make_loss(cfg: Config, model: LatentWorld):
    """Square error of what is told about the teacher's vectors, and the terms against collapse."""

    def loss(params: PyTree, batch: PyTree, key: Array, state: TrainState) -> tuple[Array, Any]:
        frames = ball.render(cfg.box, batch["states"][..., :2])
        seen = encode(model, params, frames[:, : cfg.context])
        told = dream(model, params, seen, cfg.ahead)
        wanted = encode(model, state.ema, frames[:, cfg.context :])
        terms = {
            "error": jnp.square(told - wanted).mean(),
            "variance": spreading.variance_term(seen),
            "covariance": spreading.covariance_term(seen),
        }
        apart = cfg.variance * terms["variance"] + cfg.covariance * terms["covariance"]
        return terms["error"] + apart, (terms, state.extra)

    return loss


def train(cfg: Config, model: LatentWorld, devices: Mesh, record: run.Run) -> TrainState | None:
    """Trains to the end, or until a signal; returns the state, or None after a signal.

    Raises:
        Collapsed: If the vectors of different frames come to be nearly the same.
    """
    key, fly = jax.random.split(jax.random.key(cfg.seed))
    length = cfg.context + cfg.ahead
    states = ball.sequences(fly, cfg.flights, length, box=cfg.box).states
    example = ball.render(cfg.box, states[:64, : cfg.context, :2])

    def watch(state: TrainState) -> dict[str, float]:
        vectors = encode(model, state.params, example).reshape(-1, cfg.model.vector)
        least = _LEAST_RANK if state.step >= cfg.warmup else 0.0
        return {"rank": representation.check_collapse(vectors, least=least)}

    rates = (cfg.learning_rate, cfg.adam_learning_rate)
    optimizer = optimizers.muon_cosine(*rates, cfg.steps, warmup=cfg.warmup)
    decay = ema.cosine(cfg.teacher, 1.0, cfg.steps)
    pure = make_train_step(make_loss(cfg, model), optimizer, stateful=True, ema_decay=decay)
    return loop.train(
        TrainState.create(jax.jit(model.init)(key, example[:1]), optimizer, key, ema=True),
        jit_step(pure, devices),
        data.InMemory({"states": np.asarray(states)}, cfg.batch, cfg.seed),
        record,
        steps=cfg.steps,
        config=cfg,
        meaning=cfg.meaning(),
        units_per_step=cfg.batch,
        unit="flights",
        save_every=cfg.save_every,
        log_every=cfg.log_every,
        evaluate=watch,
    )


def main(cfg: Config) -> int:
    """Trains, rolls out, measures, draws; returns the exit status."""
    mesh.keep_host_memory()
    devices = mesh.make(cfg.mesh, batch=cfg.batch)
    run.enable_compile_cache()
    model = LatentWorld(cfg.model)
    with run.Run(cfg.run) as record:
        state = train(cfg, model, devices, record)
        if state is None:
            return 0
        student, teacher = jax.device_get((state.params, state.ema))
        flights = report.unseen_flights(cfg.box, cfg.context, cfg.seed)
        rollouts = report.rollouts(model, student, teacher, flights, cfg.context, cfg.seed)
        report.write(record, rollouts, flights, cfg.context, {"steps": cfg.steps, "seed": cfg.seed})
    return 0


if __name__ == "__main__":
    command.run(main, Config, __doc__)
