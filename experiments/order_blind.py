r"""Without positions an encoder cannot know who ate whom: a sentence is a bag of words.

    python -m experiments.order_blind

"the cat ate the mouse" and "the mouse ate the cat" go through random encoders of two layers, never
trained. How far the mean of the words' vectors moves when the sentence is told with the roles
swapped, or backwards, as a share of its length (means of 16 encoders, in float64), and whether the
words' vectors are the same in any order, bit for bit when rounded to float32; 13 s of processor:

                  swapped   backwards   the same vectors
    none            3e-16       3e-16   swapped and backwards
    sinusoidal       0.13        0.12   neither
    learned          0.26        0.32   neither
    rotary           0.09        0.10   neither
    ALiBi            0.02       3e-16   backwards
    T5 bias          0.22        0.29   neither

ALiBi in both directions knows distances but not sides: to it a sentence and its mirror are one.
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

from jaxformer.layers import block, mlp, norms, stack
from jaxformer.layers.attention import SelfAttention
from jaxformer.ops import positions, rotary
from jaxformer.training import run
from jaxformer.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoders.

    Attributes:
        run: Folder for the report and the picture.
        sentence, swapped: The same words in two orders.
        encoders: How many are drawn.
        width, num_heads, num_layers: D, N, and blocks.
        seed: Of everything random.
    """

    run: str = "runs/order_blind"
    sentence: str = "the cat ate the mouse"
    swapped: str = "the mouse ate the cat"
    encoders: int = 16
    width: int = 32
    num_heads: int = 4
    num_layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if sorted(self.sentence.split()) != sorted(self.swapped.split()):
            raise ValueError(f"{self.sentence!r} and {self.swapped!r} have different words.")
        if self.sentence.split() == self.swapped.split():
            raise ValueError("sentence and swapped are the same.")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How an encoder is told the order: by a vector added to each word, by a rotation, by a bias.

    Attributes:
        add: Takes a generator, T and D; gives vectors to add to the words' own, which are normal.
        rotate: For `SelfAttention`.
        bias: Takes a generator, T and N; gives what is added to the logits.
    """

    add: Callable[..., Any] | None = None
    rotate: Callable[..., Array] | None = None
    bias: Callable[..., Any] | None = None


def schemes() -> dict[str, Scheme]:
    """Every way of telling positions, and none; what would be learned is drawn."""

    def t5(random: np.random.Generator, length: int, heads: int) -> Array:
        table = jnp.asarray(random.normal(size=(32, heads)))
        return positions.bucket_bias(table, positions.t5_buckets(length, length))

    def alibi(_: Any, length: int, heads: int) -> Array:
        return positions.alibi_bias(positions.alibi_slopes(heads), length, length)

    return {
        "none": Scheme(),
        "sinusoidal": Scheme(add=lambda _, n, width: positions.sinusoidal(jnp.arange(n), width)),
        "learned": Scheme(add=lambda random, *size: random.normal(size=size)),
        "rotary": Scheme(rotate=rotary.rotate),
        "ALiBi": Scheme(bias=alibi),
        "T5 bias": Scheme(bias=t5),
    }


class Blocks(nn.Module):
    """The encoder after its embedding: blocks that look both ways, and a norm."""

    cfg: Config
    rotate: Callable[..., Array] | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "1 N T T"] | None
    ) -> Float[Array, "B T D"]:
        """Encodes each word in its sentence."""
        attention = functools.partial(SelfAttention, self.cfg.num_heads, rotate=self.rotate)
        make = functools.partial(
            block.Block, attention=attention, mlp=functools.partial(mlp.MLP, 2 * self.cfg.width)
        )
        x = stack.Stack(make, self.cfg.num_layers, name="blocks")(x, bias=bias)
        return norms.RMSNorm(name="norm")(x)


def orders(cfg: Config) -> Int[np.ndarray, "3 T"]:
    """Numbers of the words: of the sentence, of the swapped one, and of the sentence backwards."""
    words = sorted(set(cfg.sentence.split()))
    told = [[words.index(word) for word in text.split()] for text in (cfg.sentence, cfg.swapped)]
    return np.array([*told, told[0][::-1]], np.int32)


def vectors(cfg: Config, scheme: Scheme) -> Float[np.ndarray, "encoders 3 T D"]:
    """What each random encoder makes of the words, in each order, in float64."""
    told, model, random = orders(cfg), Blocks(cfg, scheme.rotate), np.random.default_rng(cfg.seed)
    length, found = told.shape[1], []

    def normal(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        rows = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        return random.normal(size=leaf.shape) / rows**0.5

    with jax.enable_x64(True):
        apply, key = jax.jit(model.apply), jax.random.key(0)
        for _ in range(cfg.encoders):
            x = random.normal(size=(told.max() + 1, cfg.width))[told]
            if scheme.add is not None:
                x = x + np.asarray(scheme.add(random, length, cfg.width), np.float64)[None]
            bias = None
            if scheme.bias is not None:
                bias = jnp.asarray(scheme.bias(random, length, cfg.num_heads), jnp.float64)
            shapes = jax.eval_shape(model.init, key, x, bias)
            found.append(np.asarray(apply(jax.tree.map(normal, shapes), x, bias)))
    return np.stack(found)


def compare(found: Float[np.ndarray, "encoders 3 T D"]) -> dict[str, Any]:
    """How far the mean vector moves, and whether the words' vectors are the same, in any order."""
    pooled = found.mean(axis=2)
    moved = np.linalg.norm(pooled[:, 1:] - pooled[:, :1], axis=-1)
    share = (moved / np.linalg.norm(pooled[:, :1], axis=-1)).mean(axis=0)
    bags = [[sorted(map(tuple, text)) for text in each] for each in found.astype(np.float32)]
    both = {"swapped": 1, "backwards": 2}
    same = [order for order, i in both.items() if all(each[0] == each[i] for each in bags)]
    return dict(zip(both, share.tolist())) | {"same_vectors": same}


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """A bar for each scheme and order; what is only rounding is written as 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.8), layout="constrained")
    axes, names = figure.add_subplot(), list(report["schemes"])
    told = {"swapped": f"“{report['config']['swapped']}”", "backwards": "backwards"}
    for side, (order, label) in zip((-0.2, 0.2), told.items()):
        heights = [report["schemes"][name][order] for name in names]
        bars = axes.bar(np.arange(len(names)) + side, heights, 0.38, label=label)
        texts = [f"{height:.2f}" if height > 1e-9 else "0" for height in heights]
        axes.bar_label(bars, texts, fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names)
    axes.set(title=f"“{report['config']['sentence']}”, told otherwise")
    axes.set_ylabel("the mean vector moves by, of its length")
    axes.legend(frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def main(cfg: Config) -> None:
    """Compares every scheme; prints the table, and writes the report and the picture."""
    begin, report = time.monotonic(), {"config": dataclasses.asdict(cfg), "schemes": {}}
    print(f"{'':14}{'swapped':>9}{'backwards':>12}   the same words' vectors, in float32")
    with run.Run(cfg.run) as record:
        for name, scheme in schemes().items():
            row = report["schemes"][name] = compare(vectors(cfg, scheme))
            same = " and ".join(row["same_vectors"]) or "neither"
            print(f"{name:14}{row['swapped']:9.2g}{row['backwards']:12.2g}   {same}", flush=True)
        record.report(report)
        draw(report, record.folder / "order_blind.png")
        print(f"{time.monotonic() - begin:.0f} s; picture and report: {record.folder}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
