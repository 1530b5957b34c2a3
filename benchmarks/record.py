"""How every benchmark times and reports."""

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

from jaxformer.typing import PyTree


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
