r"""Where linear attention loses: it recalls fewer pairs than softmax, the fewer its state holds.

    python -m experiments.associative_recall

A text names P keys, each followed by its value, then asks for every key once, in another order
(Arora et al. 2023, "Zoology", https://arxiv.org/abs/2312.04927). Right answers after 300 steps,
one seed; 7 min 40 s in all on one core. Random features have hardly begun to learn:

    pairs           4      8     16     32     64     keeps, numbers a layer
    softmax       100    100    100    100    100 %   24,576
    Taylor        100    100    100    100    100 %   10,404
    elu + 1      99.5   98.6   94.6   85.6   62.6 %    1,088
    ReLU         98.9   97.4   93.0   81.9   59.2 %    1,088
    128 random   69.6   54.4   42.0   32.1   24.1 %    8,704
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxformer.layers import block, embed, mlp, norms, stack
from jaxformer.layers.attention import SelfAttention
from jaxformer.layers.linear import Dense
from jaxformer.ops import attention, losses
from jaxformer.ops.attention import linear
from jaxformer.training import mesh, optimizers, run
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step
from jaxformer.typing import Array, Float, Int, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the task, of the models, and of their training.

    Attributes:
        run: Folder for the report and the picture.
        pairs: How many pairs a text may have; the last is the most.
        vocab: Different keys, and as many different values.
        width: D.
        num_heads: N.
        num_features: Random features of a head.
        steps, batch: Training steps of each model, and texts in each.
        learning_rate: Peak.
        tests: Batches of each number of pairs, for the accuracy.
        seed: Of everything random.
    """

    run: str = "runs/associative_recall"
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    vocab: int = 128
    width: int = 64
    num_heads: int = 4
    num_features: int = 128
    steps: int = 300
    batch: int = 64
    learning_rate: float = 0.01
    tests: int = 4
    seed: int = 0


def texts(
    cfg: Config, random: np.random.Generator, pairs: int | None = None
) -> dict[str, Int[np.ndarray, "B T"]]:
    """Draws texts of `pairs` pairs, or if None, of as many for each as `cfg.pairs` allows.

    Pairs and questions begin at fixed places and are filled up with a token that means nothing.
    The answers are of the last `cfg.pairs[-1]` tokens, and -1 where nothing is asked.
    """
    most, blank = cfg.pairs[-1], 2 * cfg.vocab
    tokens = np.full((cfg.batch, 3 * most), blank, np.int32)
    answers = np.full((cfg.batch, most), -1, np.int32)
    for row in range(cfg.batch):
        count = random.choice(cfg.pairs) if pairs is None else pairs
        keys = random.permutation(cfg.vocab)[:count]
        values = cfg.vocab + random.integers(0, cfg.vocab, count)
        order = random.permutation(count)
        tokens[row, : 2 * count : 2], tokens[row, 1 : 2 * count : 2] = keys, values
        tokens[row, 2 * most : 2 * most + count] = keys[order]
        answers[row, :count] = values[order]
    return {"tokens": tokens, "answers": answers}


class Recaller(nn.Module):
    """Blocks over the sum of each token's vector and another one of the token before.

    The second puts a key and its value into one place, as the paper's short convolutions do.
    """

    cfg: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B most V"]:
        """Scores the answers to the last `cfg.pairs[-1]` tokens."""
        cfg, vocab = self.cfg, 2 * self.cfg.vocab + 1
        before = jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=vocab - 1)
        now, past = (embed.Embed(vocab, cfg.width, name=name) for name in ("token", "token_before"))
        x = now(tokens) + past(before)
        make = functools.partial(
            block.Block,
            attention=functools.partial(SelfAttention, cfg.num_heads, attend=self.attend),
            mlp=functools.partial(mlp.MLP, 2 * cfg.width),
        )
        x = stack.Stack(make, 1, name="blocks")(x, attention.causal())
        return Dense(vocab, name="head")(norms.RMSNorm(name="norm")(x[:, -cfg.pairs[-1] :]))


def contenders(cfg: Config) -> dict[str, tuple[Callable[..., Any], int]]:
    """Functions for `attend`, and what each keeps of the past, in numbers a layer."""
    channels, draw_map = cfg.width // cfg.num_heads, linear.positive_random_features
    random = draw_map(jax.random.key(cfg.seed + 1), channels, cfg.num_features)
    maps: dict[str, Any] = {"elu + 1": linear.elu_plus_one, "ReLU": linear.relu}
    maps |= {"Taylor": linear.taylor, f"{cfg.num_features} random": random}
    found: dict[str, Any] = {"softmax": (attention.attend, 2 * cfg.width * 3 * cfg.pairs[-1])}
    for name, feature_map in maps.items():
        of_keys = feature_map.keys if isinstance(feature_map, linear.FeaturePair) else feature_map
        features = jax.eval_shape(of_keys, jax.ShapeDtypeStruct((channels,), jnp.float32)).shape[0]
        found[name] = linear.as_attend(feature_map), cfg.num_heads * features * (channels + 1)
    return found


def train(cfg: Config, model: Recaller) -> PyTree:
    """Trains on texts with every number of pairs; the same texts for every model."""

    def loss(params: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict]:
        logits: Any = model.apply(params, batch["tokens"])
        asked = batch["answers"] >= 0
        each = losses.cross_entropy(logits, batch["answers"], where=asked)
        return each.sum() / asked.sum(), {}

    schedule = optimizers.warmup_cosine(cfg.learning_rate, cfg.steps, warmup=cfg.steps // 10)
    optimizer = optimizers.adamw(schedule, weight_decay=0.01)
    step = jit_step(make_train_step(loss, optimizer), mesh.make("data=1"))
    key, random = jax.random.key(cfg.seed), np.random.default_rng(cfg.seed)
    params = jax.jit(model.init)(key, texts(cfg, random)["tokens"][:1])
    state = TrainState.create(params, optimizer, key)
    for _ in range(cfg.steps):
        state, _ = step(state, texts(cfg, random))
    return jax.device_get(state.params)


def accuracies(cfg: Config, model: Recaller, params: PyTree) -> dict[int, float]:
    """Share of right answers on fresh texts, for each number of pairs."""
    answer = jax.jit(lambda params, tokens: jnp.asarray(model.apply(params, tokens)).argmax(-1))
    random = np.random.default_rng(cfg.seed + 1)
    found = {}
    for pairs in cfg.pairs:
        batches = (texts(cfg, random, pairs) for _ in range(cfg.tests))
        right = [answer(params, batch["tokens"]) == batch["answers"] for batch in batches]
        found[pairs] = float(np.mean(np.asarray(right)[..., :pairs]))
    return found


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy against the number of pairs, a line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    pairs = report["config"]["pairs"]
    for (name, row), width in zip(report["models"].items(), (6, 3, 3, 2, 3)):  # lines may coincide
        label = f"{name}: keeps {row['state']:,}"
        axes.plot(pairs, row["accuracy"].values(), "o-", ms=2 * width, lw=width, label=label)
    axes.set(xscale="log", xlabel="pairs in the text", ylabel="right answers", ylim=(0, 1.03))
    axes.set_xticks(pairs, [str(x) for x in pairs])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(path, dpi=130)


def main(cfg: Config) -> None:
    """Trains every model in turn; prints the table, and writes the report and the picture."""
    run.enable_compile_cache()
    report: dict[str, Any] = {"config": dataclasses.asdict(cfg), "models": {}}
    print(f"{'':14}{'keeps':>8}{'seconds':>9}" + "".join(f"{n:>8}" for n in cfg.pairs), "pairs")
    with run.Run(cfg.run) as record:
        for name, (attend, state) in contenders(cfg).items():
            began = time.monotonic()
            model = Recaller(cfg, attend)
            accuracy = accuracies(cfg, model, train(cfg, model))
            row = {"state": state, "seconds": round(time.monotonic() - began)}
            report["models"][name] = row | {"accuracy": accuracy}
            shares = "".join(f"{100 * x:7.1f}%" for x in accuracy.values())
            print(f"{name:14}{state:8,}{row['seconds']:9}{shares}", flush=True)
        record.report(report)
        draw(report, record.folder / "recall.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
