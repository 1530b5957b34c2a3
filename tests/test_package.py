"""What importing costs and does, and that every module says what it is."""

import ast
import json
import pathlib
import pkgutil
import statistics
import subprocess
import sys

import pytest

import jaxformer

ROOT = pathlib.Path(jaxformer.__file__).parents[1]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(jaxformer.__path__, prefix="jaxformer.")
)


def python(program, **environment):
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def loaded_by(imports):
    """The outermost packages that an import loads."""
    names = "sorted({name.partition('.')[0] for name in sys.modules})"
    return set(json.loads(python(f"import json, sys; {imports}; print(json.dumps({names}))")))


def test_importing_the_package_loads_nothing_else():
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "jaxtyping", "chex"}
    assert not heavy & loaded_by("import jaxformer")


def test_importing_the_package_takes_less_than_50_ms():
    program = (
        "import time; start = time.perf_counter(); import jaxformer; "
        "print(time.perf_counter() - start)"
    )
    assert statistics.median(float(python(program)) for _ in range(5)) < 0.05


def test_importing_the_ops_loads_neither_flax_nor_optax_nor_orbax():
    ops = ", ".join(name for name in MODULES if name.startswith("jaxformer.ops"))
    loaded = loaded_by(f"import {ops}")
    assert "jax" in loaded
    assert not {"flax", "optax", "orbax", "chex", "beartype"} & loaded


def test_importing_everything_touches_no_device():
    # JAX would fail to find this platform as soon as anything asked for a device or an array.
    program = f"import {', '.join(MODULES)}; print('imported')"
    assert python(program, JAX_PLATFORMS="nonexistent") == "imported\n"
    with pytest.raises(AssertionError, match="nonexistent"):
        python("import jax; jax.numpy.zeros(1)", JAX_PLATFORMS="nonexistent")


def test_the_version_is_a_version():
    assert len(jaxformer.__version__.split(".")) == 3
    assert all(part.isdecimal() for part in jaxformer.__version__.split("."))


def test_every_module_says_what_it_is():
    for name in ("jaxformer", *MODULES):
        path = ROOT / pathlib.Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert ast.get_docstring(ast.parse(path.read_text())), name
