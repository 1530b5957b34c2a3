"""The experiment's training step is compiled for a TPU slice, and lowered for CUDA, without either.

A slice that nobody has is described to libtpu by name. That settles what its memory must hold and
that no operation is missing there; it says nothing of speed.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments import ar_mnist
from jaxformer.models.image_gpt import ImageGPT
from jaxformer.training.state import TrainState
from jaxformer.training.step import jitted, make_train_step

cfg = ar_mnist.Config(compute_dtype="bfloat16", batch=256)
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
devices = Mesh(np.asarray(chips), ("data",), axis_types=(AxisType.Auto,))
model, optimizer = ImageGPT(cfg.model), ar_mnist.make_optimizer(cfg)


def create(key):
    tokens = jnp.full((1, cfg.model.cells), cfg.model.vocab_size, jnp.int32)
    return TrainState.create(model.init(key, tokens), optimizer, key, ema=True)


state = jax.eval_shape(create, jax.random.key(0))
batch = {
    "images": jax.ShapeDtypeStruct((cfg.batch, 28, 28), np.uint8),
    "labels": jax.ShapeDtypeStruct((cfg.batch,), np.int32),
}
loss = ar_mnist.make_loss(cfg, model)
step = make_train_step(loss, optimizer, ema_decay=cfg.ema, compute_dtype=cfg.compute_dtype)

cuda = jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
    compiled = jitted(step, devices).lower(state, batch).compile()
memory, inputs = compiled.memory_analysis(), compiled.input_shardings[0][1]
found = {
    "cuda": cuda.count("stablehlo.dot_general"),
    "cuda_bfloat16": cuda.count("xbf16>"),
    "parameters": sum(4 * x.size for x in jax.tree.leaves(state.params)),
    "given": memory.argument_size_in_bytes,
    "reused": memory.alias_size_in_bytes,
    "needed": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
    "images": inputs["images"].shard_shape(batch["images"].shape),
    "all_reduces": compiled.as_text().count("all-reduce"),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_training_step_compiles_for_eight_chips_and_fits_their_memory(found):
    assert 0 < found["needed"] < 16 * 2**30


def test_each_chip_has_an_eighth_of_the_batch_and_gradients_are_summed_over_chips(found):
    assert found["images"] == [256 // 8, 28, 28]
    assert found["all_reduces"] > 0


def test_the_new_state_takes_the_place_of_the_old(found):
    assert found["given"] > 4 * found["parameters"]  # with the average and the two moments
    assert found["reused"] > 0.9 * 4 * found["parameters"]


def test_the_same_step_lowers_for_cuda_with_products_in_bfloat16(found):
    assert found["cuda"] > 0
    assert found["cuda_bfloat16"] > 0
