"""The TPU kernels of linear attention, interpreted, are its chunked form; and they compile."""

import contextlib
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.attention import _linear_tpu, linear
from jaxformer.ops.attention.linear import State

EPS = {jnp.float32: 2.0**-23, jnp.bfloat16: 2.0**-8}


@contextlib.contextmanager
def interpreted():
    """Runs kernels on CPU with two cores, poisons fresh memory, and fails if the cores race."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert not interpret_pallas_call.races.races_found


def draw(batch, length, heads, kv_heads, head_dim, value_dim, dtype, feature_map):
    """q, k, v, a state of the size of their own, and cotangents of all results."""
    random = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q = normal(batch, length, heads, head_dim, dtype=dtype)
    k = normal(batch, length, kv_heads, head_dim, dtype=dtype)
    v = normal(batch, length, kv_heads, value_dim, dtype=dtype)
    features = linear._pair(feature_map).keys(k.astype(jnp.float32))
    unit, shape = features.mean(), (batch, kv_heads, features.shape[-1])
    state = State(normal(*shape, value_dim) * unit, length * unit * jnp.abs(normal(*shape)))
    after = State(normal(*shape, value_dim), normal(*shape))
    after = jax.tree.map(lambda x: x / unit / length, after)
    return (q, k, v, state), (normal(*q.shape[:3], value_dim, dtype=dtype), after)


@functools.partial(jax.jit, static_argnums=(0, 1))
def everything(implementation, feature_map, arguments, cotangents, lengths):
    """Values, state, and the gradients of both."""

    def f(q, k, v, state):
        return linear.attend(
            q,
            k,
            v,
            feature_map=feature_map,
            key_lengths=lengths,
            state=state,
            return_state=True,
            implementation=implementation,
        )

    y, pull_back = jax.vjp(f, *arguments)
    return y, pull_back(cotangents)


RANDOM = linear.positive_random_features(jax.random.key(0), 32, 100)
CASES = {
    "grouped": ((2, 300, 4, 2, 64, 64, jnp.float32, linear.elu_plus_one), [300, 77]),
    "narrow": ((1, 300, 2, 2, 128, 128, jnp.bfloat16, linear.elu_plus_one), None),
    "odd": ((1, 130, 3, 3, 7, 5, jnp.float32, linear.relu), None),
    "features": ((1, 257, 4, 1, 32, 64, jnp.float32, RANDOM), [201]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_interpreted_agree_with_the_chunked_form(name, monkeypatch):
    sizes, lengths = CASES[name]
    monkeypatch.setattr(_linear_tpu, "_VMEM", 1)  # a block is one chunk: the state must travel
    dtype, feature_map = sizes[-2:]
    lengths = None if lengths is None else jnp.array(lengths)
    arguments, cotangents = draw(*sizes)
    with interpreted():
        found = everything("tpu", feature_map, arguments, cotangents, lengths)
    expected = everything("chunked", feature_map, arguments, cotangents, lengths)
    assert found[0][0].dtype == dtype
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert one.dtype == other.dtype
        largest = np.abs(np.float64(other)).max()
        np.testing.assert_allclose(
            np.float64(one), np.float64(other), atol=16 * EPS[dtype] * largest
        )


def test_blocks_of_several_chunks_give_the_same(monkeypatch):
    sizes = (1, 600, 2, 2, 64, 64, jnp.float32, linear.elu_plus_one)
    plan = _linear_tpu._plan(64, 64, 2, 2, None, jnp.float32)
    assert plan.chunks > 1
    arguments, cotangents = draw(*sizes)
    with interpreted():
        found = everything("tpu", linear.elu_plus_one, arguments, cotangents, None)
    expected = everything("chunked", linear.elu_plus_one, arguments, cotangents, None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=16 * 2.0**-23 * np.abs(other).max())


def test_queries_that_see_nothing_get_zeros_and_send_zero_gradients():
    (q, k, v, _), _ = draw(2, 130, 2, 2, 64, 64, jnp.float32, linear.relu)

    def loss(q, k, v):
        y = linear.attend(
            q,
            k,
            v,
            feature_map=linear.relu,
            key_lengths=jnp.array([0, 130]),
            implementation="tpu",
        )
        return jnp.square(y - 1).sum(), y

    with interpreted():
        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert (np.asarray(y)[0] == 0).all()
    assert (np.asarray(y)[1] != 0).any()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[0] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "chunk", "message"),
    [(jnp.float32, 100, "chunk=100"), (jnp.float64, None, "float64")],
)
def test_what_the_kernel_cannot_honour_it_refuses(dtype, chunk, message):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.ones((1, 7, 2, 5), dtype)
        with pytest.raises(NotImplementedError, match=message):
            linear.attend(x, x, x, implementation="tpu", chunk=chunk)


PROGRAM = """
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.ops.attention import linear

found = {}
for name in sys.argv[1:]:
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.asarray(chips[:1]), ("one",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def loss(q, k, v):
        y = linear.attend(q, k, v, implementation="tpu")
        return jnp.square(y.astype(jnp.float32)).sum()

    x = [jax.ShapeDtypeStruct((1, 1000, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=sharding).lower(*x)
    memory = lowered.compile().memory_analysis()
    found[name] = [lowered.as_text().count("tpu_custom_call"), memory.temp_size_in_bytes]
print(json.dumps(found))
"""


def test_forward_and_backward_compile_for_chips_that_are_not_there():
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, "v5e:2x2", "v6e:2x2"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for kernels, extra in json.loads(ran.stdout.splitlines()[-1]).values():
        assert kernels == 2
        assert extra < 1000 * 1000 * 4 * 2  # no weights of all queries and keys
