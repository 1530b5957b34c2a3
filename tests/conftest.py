"""Eight simulated CPU devices, strict rank promotion, and a compile cache that survives the run."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "jax")  # each has a cache of its own
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / _WORKER)
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def real_data() -> pathlib.Path:
    """The folder of whole data sets that `JAXFORMER_TEST_DATA` names; the test skips without."""
    folder = os.environ.get("JAXFORMER_TEST_DATA")
    if not folder:
        pytest.skip("JAXFORMER_TEST_DATA names no folder of data sets")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def draw():
    """Draws variables for a module without compiling its initialisation; no leaf is constant."""

    def variables(module, *args, seed=0, **kwargs):
        init = functools.partial(module.init, **kwargs)
        shapes = jax.eval_shape(init, jax.random.key(0), *args)
        random = np.random.default_rng(seed)

        def leaf(shape):
            size = shape.shape[-2] ** -0.5 if len(shape.shape) > 1 else 1.0
            return jnp.asarray(size * random.standard_normal(shape.shape), shape.dtype)

        return jax.tree.map(leaf, shapes)

    return variables
