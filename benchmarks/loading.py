"""Peak memory of loading a checkpoint beside its parameters, and the time it takes.

    python -m benchmarks.loading                    one minute; writes and removes 0.4 GB

The folder has shards of up to 200 MB. A fresh process loads it and reads its own memory meanwhile;
what is counted is by how much the peak exceeds the memory before loading and the bytes of the
parameters. Pages of mapped files do not count. Linux only.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import record
from jaxformer import interop
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig

CHILD = """
import json, re, sys, threading, time
import jax
from jaxformer import interop
from jaxformer.interop import llama
jax.block_until_ready(jax.numpy.zeros(1))
def memory():  # without the pages of files, which the kernel takes back as it likes
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, began, peak, done = memory(), time.perf_counter(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], memory())
watcher = threading.Thread(target=watch)
watcher.start()
_, params = interop.load(sys.argv[1])
jax.block_until_ready(params)
seconds = time.perf_counter() - began
done.append(True)
watcher.join()
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"seconds": seconds, "bytes": size, "beside": peak[0] - before - size}))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to load.

    Attributes:
        width: D.
        layers: Blocks.
        shard_bytes: Bytes of a file.
    """

    width: int = 1024
    layers: int = 8
    shard_bytes: int = 200_000_000


def main(cfg: Config) -> None:
    """Prints one line of JSON."""
    sizes: Any = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 64, "hidden": 3 * cfg.width}
    model = Decoder(TransformerConfig(8192, cfg.width, cfg.layers, **sizes))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "model"
        interop.save(model, params, folder, shard_bytes=cfg.shard_bytes)
        shards = [x.stat().st_size for x in folder.glob("*.safetensors")]
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, folder], capture_output=True, text=True, check=True
        )
        found = json.loads(ran.stdout)
    figures = {
        "seconds": round(found["seconds"], 2),
        "parameters_mb": round(found["bytes"] / 1e6, 1),
        "peak_beside_mb": round(found["beside"] / 1e6, 1),
        "largest_shard_mb": round(max(shards) / 1e6, 1),
        "shards": len(shards),
    }
    record.report("loading", figures, ("safetensors",))


if __name__ == "__main__":
    main(tyro.cli(Config))
