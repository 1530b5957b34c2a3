"""A training run in small, started and killed by test_kill.py.

    python kill_driver.py FOLDER STEPS [--rate R] [--stall-in-deletion]

Prints `ready`, `from N`, and each step it has finished; leaves the last parameters in `final.npz`.
"""

import argparse
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.training import checkpoint, data, interrupts

SAVE_EVERY = 2


def start(optimizer, width=512):
    params = {"in": jnp.eye(8, width), "out": jnp.zeros((width, 1))}
    return {
        "params": params,
        "opt": optimizer.init(params),
        "step": jnp.int32(0),
        "key": jax.random.key(7),
    }


def make_step(optimizer):
    def loss_of(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        hidden *= jax.random.bernoulli(key, 0.9, hidden.shape)
        return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)

    @jax.jit
    def step(state, batch):
        key = jax.random.fold_in(state["key"], state["step"])
        grads = jax.grad(loss_of)(state["params"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "opt": opt, "step": state["step"] + 1}

    return step


def stall_halfway(path, rmtree=shutil.rmtree, **options):
    files = sorted(file for file in pathlib.Path(path).rglob("*") if file.is_file())
    if pathlib.Path(path).name != "trash" or not files:
        return rmtree(path, **options)
    for file in files[: len(files) // 2]:
        file.unlink()
    print("halfway", flush=True)
    time.sleep(600)


def train(folder, steps, rate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((53, 8), np.float32)
    arrays = {"x": x, "y": np.sin(x.sum(1, keepdims=True))}

    def jitter(batch, rng):
        return batch | {"x": batch["x"] + rng.standard_normal((16, 8), np.float32) / 10}

    source = data.InMemory(arrays, batch_size=16, seed=3, transform=jitter)
    optimizer = optax.adam(rate)
    state, step = start(optimizer), make_step(optimizer)
    with (
        checkpoint.Checkpoints(folder / "checkpoints", {"rate": rate}, keep=2) as checkpoints,
        interrupts.Interrupts() as caught,
    ):
        done = 0
        if restored := checkpoints.restore(state):
            done, state = restored.step, restored.state
            data.check_position(source, done, restored.data_position)
        print(f"from {done}", flush=True)
        while done < steps and not caught.requested:
            state, done = step(state, source.batch(done)), done + 1
            if done % SAVE_EVERY == 0 or caught.reached(done):
                checkpoints.save(done, state, source.position(done))
            print(done, flush=True)
        if checkpoints.latest_step != done:
            checkpoints.wait()
        if checkpoints.latest_step != done:
            checkpoints.save(done, state, source.position(done), wait=True)
    if done == steps:
        leaves = {**state, "key": jax.random.key_data(state["key"])}
        np.savez(folder / "final.npz", *jax.tree.leaves(leaves))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--stall-in-deletion", action="store_true")
    options = parser.parse_args()
    if options.stall_in_deletion:
        shutil.rmtree = stall_halfway
    print("ready", flush=True)
    train(options.folder, options.steps, options.rate)
