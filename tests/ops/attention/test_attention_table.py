"""The documented table of refusals is what the implementations answer, and the door refuses so."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.attention import flash

ROOT = pathlib.Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("table", ROOT / "scripts/make_attention_table.py")
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)
NEW = jax.__version_info__ >= (0, 11)


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_in_the_docs_is_what_the_code_answers():
    names = tuple(table.MODULES) if NEW else ("tpu", "triton", "xla")
    found = cells(table.rows(names))
    text = (ROOT / "docs/attention.md").read_text().splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("| call |"))
    documented = cells(text[start : start + len(found)])
    keep = [i for i, name in enumerate(documented[0]) if name in ("call", *names)]
    assert [[row[i] for i in keep] for row in documented[2:]] == found[2:]


def test_mosaic_gpu_needs_a_new_jax():
    answer = table.answer("gpu", {"dtype": jnp.bfloat16})
    assert answer is None if NEW else "needs jax 0.11 or newer" in answer


@pytest.mark.parametrize("name", ["tpu", "gpu", "triton"])
def test_an_implementation_is_refused_on_another_platform(name):
    x = jnp.ones((1, 3, 1, 4), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match=f"'{name}' cannot: it needs a .PU, this is a CPU"
    ):
        flash.attend(x, x, x, implementation=name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "tpu"),
        ("NVIDIA H200", "gpu" if NEW else "triton"),
        ("NVIDIA A100", "triton"),
    ],
)
def test_while_compiling_for_a_device_its_implementation_is_chosen(kind, name):
    try:
        device = jax.sharding.AbstractDevice
    except AttributeError:
        device = __import__("jax._src.mesh", fromlist=["AbstractDevice"]).AbstractDevice
    extra = {"platform": "tpu" if "TPU" in kind else "cuda"}
    extra = extra if "platform" in device.__dataclass_fields__ else {}
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), abstract_device=device(device_kind=kind, num_cores=1, **extra)
    )
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = flash.choose(x, x, x)
    assert choice.implementation == name
    assert ("gpu" in choice.passed_over) == (name == "triton")
