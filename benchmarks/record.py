"""How every benchmark times and reports."""

import functools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.typing import Array, PyTree


def perturbed(params: PyTree) -> PyTree:
    """Adds noise to fresh parameters, so that no layer that starts as the identity stays one."""
    noise = jax.random.normal(jax.random.key(1), (4096,))
    return jax.tree.map(lambda x: x + 0.05 * jnp.resize(noise, x.shape), params)


def llama_of_both(cfg: Any, **settings: Any) -> tuple[Any, Any, PyTree]:
    """A Llama of transformers with weights drawn at random, and ours with the same weights.

    Args:
        cfg: With its sizes: vocab_size, width, layers, heads of 64 channels, hidden.
        **settings: More of transformers' own.
    """
    import torch
    import transformers

    from jaxformer import interop
    from jaxformer.training import mesh

    torch.set_num_threads(mesh.usable_cores())
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    sizes = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads // 2,
        head_dim=64,
        intermediate_size=cfg.hidden,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **settings,
    )
    theirs = transformers.LlamaForCausalLM(sizes)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, *interop.load(folder)


def race(
    name: str,
    loss_of: Callable[[PyTree], Array],
    params: PyTree,
    loss_of_torch: Callable[[], Any],
    parameters: Any,
    *,
    rounds: int,
    count: int,
    unit: str,
) -> None:
    """Times a training step with AdamW beside one of PyTorch, and prints a line of JSON for each.

    Both losses must fall alike over the first steps before anything is timed.

    Args:
        name: Of the benchmark.
        loss_of: Our loss of the parameters.
        params: These, which stay as they are.
        loss_of_torch: Their loss, a tensor.
        parameters: Those of their model.
        rounds: Timings of each.
        count: How many of what `unit` names a step takes.
        unit: Of the speed.
    """
    optimizer = optax.adamw(1e-3, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, Array]:
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    now: list[Any] = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def ours() -> float:
        now[0], now[1], loss = step(*now)
        return float(loss)

    of_torch = torch_step(loss_of_torch, parameters)
    for _ in range(3):
        np.testing.assert_allclose(ours(), of_torch(), rtol=1e-3)
    runs = {"jaxformer": ours, "transformers": of_torch}
    seconds = interleaved(runs, rounds=rounds, settle=True)
    mine = np.median(seconds["jaxformer"])
    for who, times in seconds.items():
        figures = {
            "of": who,
            "parameters": optax.tree.size(params),
            f"{unit}_per_second": round(count / float(np.median(times)), 1),
            "jaxformer_is_faster_by": round(float(np.median(times) / mine), 2),
        }
        report(name, figures | spread(times), ("transformers", "torch"))


def torch_step(loss_of: Callable[[], Any], parameters: Any) -> Callable[[], float]:
    """Makes the step of PyTorch that `race` times, which returns the loss before it."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def interleaved(
    work: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1, settle: bool = False
) -> dict[str, list[float]]:
    """Times functions in turn, A B A B ..., so that a machine's drift meets all of them alike.

    Args:
        work: Functions by name; each is called once before anything is timed, and must not return
            before its work is done.
        rounds: How often each is timed.
        repeats: Calls in one timing.
        settle: Call each once more, untimed, before every timing; where one of them uses gigabytes,
            giving those back would else fall into the time of the next.

    Returns:
        Seconds a call, one figure a round.
    """
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            if settle:
                function()
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Summarises timings in milliseconds."""
    low, middle, high = np.quantile(np.array(seconds) * 1e3, [0.0, 0.5, 1.0])
    return {"median_ms": round(middle, 3), "min_ms": round(low, 3), "max_ms": round(high, 3)}


def report(name: str, figures: Mapping[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Prints one line of JSON: the figures, the device and the versions they belong to."""
    device = jax.devices()[0]
    versions = {package: metadata.version(package) for package in ("jax", "flax", *packages)}
    where = {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": name, **figures, **where, **versions}), flush=True)
