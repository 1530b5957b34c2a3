"""A training step of the MNIST experiment's model against the same model in PyTorch, on CPU.

    python -m benchmarks.train_step            needs torch; two minutes on two cores

Both have the same weights and the same batch, and their losses must agree before anything is timed.
Both train in float32 with AdamW (fused in torch) and run in turn in one process, on all cores. Both
profit from the allocator's settings of `mesh.keep_host_memory`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer.models import image_gpt
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.ops import linear, losses
from jaxformer.ops.attention import blocked
from jaxformer.training import mesh, optimizers
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        batch: Images a step.
        rounds: Timings of each.
        repeats: Steps in one timing.
        compile: Times `torch.compile` as well.
    """

    batch: int = 32
    rounds: int = 15
    repeats: int = 3
    compile: bool = False


def ours(config: ImageGPTConfig, params, cells, labels):
    """Returns a function that takes one step and gives the loss, as fast as this library can."""
    devices = mesh.make()
    model = ImageGPT(config, blocked.attend_causal, linear.project_input_first)

    def loss(params, batch, key):
        tokens = image_gpt.with_class(batch["labels"], batch["cells"], config)
        logits = jnp.asarray(model.apply(params, tokens))
        return losses.cross_entropy(logits, batch["cells"]).mean(), {}

    optimizer = optimizers.adamw(1e-3, clip_norm=1e9)
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
    step = jit_step(make_train_step(loss, optimizer), devices)
    batch = {"cells": cells, "labels": labels}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def theirs(config: ImageGPTConfig, params, cells, labels, *, compiled: bool):
    """Returns the same function for the PyTorch model of the same weights."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(mesh.usable_cores())
    weights = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(np.array(x))), params)
    weights = weights["params"]
    heads, side = config.num_heads, config.side // config.patch
    offsets = torch.tensor(config.neighbours)
    place = torch.arange(config.cells)[:, None]
    column = place % side + offsets[:, 1]
    source = place + offsets[:, 0] * side + offsets[:, 1]
    known = (source >= 0) & (column >= 0) & (column < side)
    gather = torch.where(known, source, 0)

    def norm(x, scale):
        return functional.rms_norm(x, (x.shape[-1],), scale, 1e-6)

    def model(cells, labels):
        neighbours = torch.where(known, cells[:, gather], config.vocab_size)
        rows = torch.arange(len(config.neighbours)) * (config.vocab_size + 1)
        table = weights["neighbours"]["table"].flatten(0, 1)
        x = functional.embedding_bag((neighbours + rows).flatten(0, 1), table, mode="sum")
        x = x.view(len(cells), config.cells, -1) + weights["positions"]["table"]
        x = x + weights["classes"]["table"][labels][:, None]
        for i in range(config.num_layers):
            layer = weights["blocks"][f"layers_{i}"]
            attend, mlp = layer["attention"], layer["mlp"]
            qkv = norm(x, attend["norm"]["scale"]) @ attend["inner"]["qkv"]["kernel"]
            q, k, v = qkv.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            q = norm(q, attend["inner"]["q_norm"]["scale"])
            k = norm(k, attend["inner"]["k_norm"]["scale"])
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2) @ attend["inner"]["out"]["kernel"]
            hidden = norm(x, mlp["norm"]["scale"]) @ mlp["inner"]["up"]["kernel"]
            x = x + torch.relu(hidden).square() @ mlp["inner"]["down"]["kernel"]
        return norm(x, weights["norm"]["scale"]) @ weights["head"]["kernel"]

    model = torch.compile(model) if compiled else model
    leaves = jax.tree.leaves(weights)
    optimizer = torch.optim.AdamW(leaves, 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    cells, labels = torch.tensor(cells, dtype=torch.long), torch.tensor(labels, dtype=torch.long)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(cells, labels)
        loss = functional.cross_entropy(logits.flatten(0, 1), cells.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main(cfg: Config) -> None:
    """Checks, times and prints."""
    mesh.keep_host_memory()
    mesh.make()
    config = ImageGPTConfig.mnist()
    rng = np.random.default_rng(0)
    cells = rng.integers(0, config.vocab_size, (cfg.batch, config.cells)).astype(np.int32)
    labels = rng.integers(0, config.num_classes, cfg.batch).astype(np.int32)
    start = jnp.full((1, config.cells), config.vocab_size, jnp.int32)
    params = record.perturbed(ImageGPT(config).init(jax.random.key(0), start))

    work = {"ours": ours(config, params, cells, labels)}
    work["torch"] = theirs(config, params, cells, labels, compiled=False)
    if cfg.compile:
        work["torch_compile"] = theirs(config, params, cells, labels, compiled=True)
    for step in range(3):
        found = {name: run() for name, run in work.items()}
        if max(found.values()) - min(found.values()) > 1e-4:
            raise SystemExit(f"the losses differ at step {step}: {found}")
    seconds = record.interleaved(work, rounds=cfg.rounds, repeats=cfg.repeats)
    tokens = cfg.batch * config.cells
    for name, each in seconds.items():
        ratio = float(np.median(np.array(each) / np.array(seconds["ours"])))
        figures = {"tokens_per_second": round(tokens / float(np.median(each)))}
        figures |= {"time_of_ours": round(ratio, 3)} | record.spread(each)
        record.report(f"train_step/{name}", figures, ("torch",))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
