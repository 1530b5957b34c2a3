"""Linear attention on CPU: against the quadratic form, decoding at any length, and as softmax.

    python -m benchmarks.linear_attention                    about three minutes on two cores
    python -m benchmarks.linear_attention --kernel-error     how near features come to softmax

The forms must agree before anything is timed, and are timed in turn in one process.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer.ops import attention
from jaxformer.ops.attention import linear
from jaxformer.ops.attention.linear import State


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        length: T.
        heads: N.
        head_dim: H.
        rounds: Timings of each.
        kernel_error: Prints the error of the feature maps in place of times.
    """

    length: int = 8192
    heads: int = 8
    head_dim: int = 64
    rounds: int = 5
    kernel_error: bool = False


def draw(seed: int, *shape: int) -> list[jax.Array]:
    """Three arrays of normal numbers: q, k and v."""
    numbers = np.random.default_rng(seed).standard_normal((3, *shape), np.float32)
    return [jnp.asarray(x) for x in numbers]


def against_quadratic(cfg: Config) -> None:
    """Times chunked and quadratic, forward alone and with the gradients of q, k and v."""
    qkv = draw(0, 1, cfg.length, cfg.heads, cfg.head_dim)

    def forward(form):
        return jax.jit(functools.partial(linear.attend, implementation=form))

    def both(form):
        f: Any = functools.partial(linear.attend, implementation=form)
        return jax.jit(jax.grad(lambda *x: jnp.square(f(*x)).sum(), argnums=(0, 1, 2)))

    for name, make in (("forward", forward), ("forward_backward", both)):
        forms = {form: make(form) for form in ("chunked", "parallel")}
        found = [jax.tree.leaves(f(*qkv)) for f in forms.values()]
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*found))
        if error > 1e-4:
            raise SystemExit(f"{name}: the forms differ by {error:.2e}.")
        work = {
            form: functools.partial(lambda f: jax.block_until_ready(f(*qkv)), f)
            for form, f in forms.items()
        }
        seconds = record.interleaved(work, rounds=cfg.rounds, settle=True)
        for form, each in seconds.items():
            memory: Any = forms[form].lower(*qkv).compile().memory_analysis()
            faster = float(np.median(np.array(seconds["parallel"]) / np.array(each)))
            figures = {"tokens": cfg.length, "heads": cfg.heads, "head_dim": cfg.head_dim}
            figures |= {"times_faster": round(faster, 1), "largest_error": float(f"{error:.1e}")}
            figures |= {"extra_MB": round(memory.temp_size_in_bytes / 1e6)}
            record.report(f"linear_attention/{name}/{form}", figures | record.spread(each))


def decoding(cfg: Config, steps: int = 2000) -> None:
    """Times tokens after a thousand and after a million, which the state has really seen."""
    places = (1_000, 10_000, 100_000, 1_000_000)
    shape = (1, cfg.heads, cfg.head_dim)
    q_one, k_one, v_one = draw(1, *shape)

    @jax.jit
    def decode(state: State) -> tuple[State, jax.Array]:
        def one(state, _):
            y, state = linear.step(q_one, k_one, v_one, state)
            return state, y

        state, y = jax.lax.scan(one, state, None, length=steps)
        return state, y[-1]

    @jax.jit
    def read(state: State, seed: jax.Array) -> State:
        q = jax.random.normal(jax.random.key(seed), (3, 1, 1000, cfg.heads, cfg.head_dim))
        _, state = linear.attend(*q, state=state, return_state=True)
        return state

    state, states = State.empty(1, cfg.heads, cfg.head_dim, cfg.head_dim), {}
    for thousand in range(max(places) // 1000):
        state = read(state, jnp.int32(thousand))
        if 1000 * (thousand + 1) in places:
            states[1000 * (thousand + 1)] = state
    work = {
        str(place): functools.partial(lambda s: jax.block_until_ready(decode(s)), state)
        for place, state in states.items()
    }
    seconds = record.interleaved(work, rounds=5 * cfg.rounds)
    first = np.array(seconds["1000"])
    for place, each in seconds.items():
        figures = {
            "tokens_before": int(place),
            "microseconds_per_token": round(1e6 * float(np.median(each)) / steps, 3),
            "time_of_first": round(float(np.median(np.array(each) / first)), 3),
            "state_bytes": sum(x.nbytes for x in states[int(place)]),
        }
        record.report("linear_attention/decode", figures)


def kernel_error(cfg: Config) -> None:
    """Prints how far weights and outputs are from those of softmax, for queries of three norms."""
    print("| feature map | F |" + "".join(f" kernel, {s} | output, {s} |" for s in (0.3, 0.6, 1.0)))
    print("|---|---|" + "---|---|" * 3)
    maps: dict[str, Any] = {
        "elu + 1": linear.elu_plus_one,
        "ReLU": linear.relu,
        "Taylor": linear.taylor,
    }
    for count in (16, 64, 256, 1024, 4096):
        draw_map = linear.positive_random_features
        maps[f"random, m = {count}"] = draw_map(jax.random.key(count), cfg.head_dim, count)
    for name, feature_map in maps.items():
        cells = []
        for scale in (0.3, 0.6, 1.0):
            q, k, v = draw(2, 1, 256, 4, cfg.head_dim)
            q, k = scale * q, scale * k
            softmax: Any = attention.attend(q, k, v)
            y: Any = linear.attend(q, k, v, feature_map=feature_map, causal=False)
            # With the identity as values the outputs are the weights.
            eye = jnp.broadcast_to(jnp.eye(256)[None, :, None], (1, 256, 4, 256))
            weights: Any = linear.attend(q, k, eye, feature_map=feature_map, causal=False)
            exact: Any = attention.attend(q, k, eye)
            pairs = ((weights, exact), (y, softmax))
            cells += [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]
        pair = feature_map if isinstance(feature_map, tuple) else (feature_map,)
        shape = jax.eval_shape(pair[-1], jax.ShapeDtypeStruct((cfg.head_dim,), jnp.float32)).shape
        print(
            f"| {name} | {shape[0]:,} |"
            + "".join(f" {float(f'{100 * x:.2g}'):g} % |" for x in cells)
        )


def main(cfg: Config) -> None:
    """Checks, times and prints."""
    if cfg.kernel_error:
        kernel_error(cfg)
        return
    against_quadratic(cfg)
    decoding(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
