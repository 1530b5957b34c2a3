"""Attention forward and backward against `jax.nn` and PyTorch, and the memory it takes.

    python -m benchmarks.attention                     CPU; needs torch; three minutes on two cores
    python -m benchmarks.attention --length 8192 --heads 16 --head-dim 128 --dtype bfloat16

Results and gradients must agree before anything is timed; all are timed in turn in one process. On
a GPU the peers are cuDNN and XLA through `jax.nn`, calls follow each other without a wait, so that
the time is the device's, and the backward is timed alone too. Rates count half of the square, and
two and a half times as many products backward as forward. Memory is what the compiled program needs
beside its arguments and results.
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
from jaxformer.ops.attention import flash


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time: causal attention of one layer.

    Attributes:
        batch: B.
        length: T, and S.
        heads: N.
        head_dim: H.
        dtype: Of q, k and v.
        rounds: Timings of each.
        calls: Calls in one timing.
        memory_length: Length at which memory is read off the compiled program.
    """

    batch: int = 1
    length: int = 2048
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    rounds: int = 9
    calls: int = 1 if jax.default_backend() == "cpu" else 20
    memory_length: int = 8192


def with_gradients(attend, q, k, v, d_out):
    """The result and the gradients of q, k and v."""
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(d_out)


def of_jax(attend, qkv, d_out):
    """Functions that attend, that attend and give all gradients, and that give these alone."""
    forward, both = jax.jit(attend), jax.jit(functools.partial(with_gradients, attend))
    pull = jax.vjp(forward, *qkv)[1]
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    return lambda: forward(*qkv), lambda: both(*qkv, d_out), lambda: backward(pull, d_out)


def of_torch(qkv, d_out, threads: int):
    """The first two of PyTorch."""
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, str(qkv[0].dtype))
    q, k, v, upstream = (
        torch.tensor(np.asarray(x, np.float32)).to(kind).transpose(1, 2) for x in (*qkv, d_out)
    )

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward():
        with torch.no_grad():
            return attend(q, k, v).transpose(1, 2).float().numpy()

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(leaves[0], leaves[1], leaves[2])
        grads = torch.autograd.grad(out, leaves, upstream)
        arrays = [x.detach().transpose(1, 2).float().numpy() for x in (out, *grads)]
        return arrays[0], tuple(arrays[1:])

    return forward, both


def main(cfg: Config) -> None:
    """Prints one line of JSON for each way of computing, and one for memory."""
    random = np.random.default_rng(0)
    shape = (cfg.batch, cfg.length, cfg.heads, cfg.head_dim)
    *qkv, d_out = (
        jnp.asarray(random.standard_normal(shape, np.float32), cfg.dtype) for _ in "qkvo"
    )
    qkv = tuple(qkv)
    cpu = jax.default_backend() == "cpu"

    ours = functools.partial(flash.attend, mask=attention.causal())
    peers = {"jaxformer": ours, "jax.nn xla": _jax_nn("xla")}
    if not cpu:
        peers["jax.nn cudnn"] = _jax_nn("cudnn")
    work: dict[str, Any] = {name: of_jax(attend, qkv, d_out) for name, attend in peers.items()}
    if cpu:
        from jaxformer.training import mesh

        work["torch"] = of_torch(qkv, d_out, mesh.usable_cores())

    expected = jax.tree.leaves(work["jax.nn xla"][1]())
    scale = 1e-5 if cfg.dtype == "float32" else 3e-2
    for name, functions in work.items():
        for one, other in zip(jax.tree.leaves(functions[1]()), expected, strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            assert np.abs(one - other).max() <= scale * np.abs(other).max(), name

    flops = 2 * cfg.batch * cfg.heads * cfg.length**2 * cfg.head_dim
    kinds = [("forward", 0, 1.0), ("forward_backward", 1, 3.5), ("backward", 2, 2.5)]
    for kind, place, products in kinds[: 2 if cpu else 3]:
        runs = {name: functools.partial(_run, fs[place], cfg.calls) for name, fs in work.items()}
        seconds = record.interleaved(runs, rounds=cfg.rounds, settle=True)
        seconds = {name: [x / cfg.calls for x in times] for name, times in seconds.items()}
        mine = np.median(seconds["jaxformer"])
        for name, times in seconds.items():
            rate = {"tflops": round(products * flops / np.median(times) / 1e12, 3)}
            ratio = {"jaxformer_is_faster_by": round(float(np.median(times) / mine), 2)}
            sizes = {"shape": "x".join(map(str, shape)), "dtype": cfg.dtype}
            record.report(
                f"attention {kind}", {"of": name, **record.spread(times), **ratio, **rate, **sizes}
            )

    big = jax.ShapeDtypeStruct((1, cfg.memory_length, cfg.heads, cfg.head_dim), cfg.dtype)
    for name, attend in peers.items():
        both = jax.jit(functools.partial(with_gradients, attend))
        memory: Any = both.lower(big, big, big, big).compile().memory_analysis()
        figures = {"of": name, "length": cfg.memory_length}
        figures["extra_mb"] = round(memory.temp_size_in_bytes / 1e6, 1)
        record.report("attention memory forward_backward", figures)


def _jax_nn(implementation: Any):
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )


def _run(f, calls):
    jax.block_until_ready([f() for _ in range(calls)][-1])


if __name__ == "__main__":
    main(tyro.cli(Config))
