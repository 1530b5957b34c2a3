"""Eight simulated CPU devices, strict rank promotion, and a compile cache that survives the run."""

import os
import pathlib

import jax
import pytest

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def real_data() -> pathlib.Path:
    """The folder of whole data sets that `JAXFORMER_TEST_DATA` names; the test skips without."""
    folder = os.environ.get("JAXFORMER_TEST_DATA")
    if not folder:
        pytest.skip("JAXFORMER_TEST_DATA names no folder of data sets")
    return pathlib.Path(folder)
