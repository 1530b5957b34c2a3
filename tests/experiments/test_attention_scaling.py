"""The experiment in small: it counts what runs, fits exponents, and writes what it found."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_scaling
from jaxformer.ops import attention
from jaxformer.ops.attention import sparse

CONFIG = attention_scaling.Config(num_heads=3)
CONTENDERS = attention_scaling.contenders()


def counted(name, length):
    return attention_scaling.operations(CONTENDERS[name], *attention_scaling.shapes(CONFIG, length))


def test_products_are_counted_through_loops_branches_and_custom_derivatives():
    matrix = jnp.ones((5, 5))

    def f(x):
        def step(x, flag):
            return jax.lax.cond(flag, lambda x: matrix @ (matrix @ x), lambda x: matrix @ x, x), ()

        x, _ = jax.lax.scan(step, x, jnp.ones(7, bool))
        return jax.jit(lambda x: matrix @ x)(x)

    assert attention_scaling.operations(f, jnp.ones((5, 3))) == (7 * 2 + 1) * 2 * 5 * 5 * 3


def test_the_programs_do_as_many_operations_as_their_tiles_say():
    causal = attention.causal()
    for length in (1024, 4096):
        heads, head_dim = CONFIG.num_heads, CONFIG.head_dim
        assert counted("dense", length) == 4 * heads * head_dim * length**2
        pattern = attention.local_global(math.isqrt(length)) & causal
        # Tiles are twice as large where they empty few.
        block = 512 if length == 1024 else 1024
        for name, mask, side in (("flash", causal, block), ("sparse", pattern, 512)):
            found = sparse.flops(mask, length, head_dim, block=side)
            assert counted(name, length) == heads * found


@pytest.mark.parametrize(
    ("name", "exponent"), [("dense", 2), ("flash", 2), ("sparse", 1.5), ("linear", 1)]
)
def test_operations_grow_with_the_exponent_of_theory(name, exponent):
    counts = {length: counted(name, length) for length in CONFIG.lengths[-3:]}
    assert abs(attention_scaling.slope(counts) - exponent) <= 0.05


def test_the_slope_of_a_power_is_its_exponent_whatever_came_before():
    powers = {length: 3.0 * length**1.5 for length in (8, 16, 64)}
    np.testing.assert_allclose(attention_scaling.slope({2: 1e9, **powers}), 1.5, rtol=1e-12)


def test_a_short_run_writes_figures_and_picture_and_leaves_out_what_was_not_run(tmp_path, capsys):
    cfg = attention_scaling.Config(
        run=str(tmp_path / "run"),
        lengths=(16, 25, 36, 49),
        dense_most=25,
        most=36,
        num_heads=1,
        head_dim=2,
        repeats=1,
    )
    attention_scaling.main(cfg)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["config"]["head_dim"] == 2
    assert set(report["contenders"]) == set(CONTENDERS)
    for name, rows in report["contenders"].items():
        assert set(rows["operations"]) == set(rows["megabytes"]) == {"16", "25", "36", "49"}
        assert set(rows["milliseconds"]) == (
            {"16", "25"} if name == "dense" else {"16", "25", "36"}
        )
        assert set(rows["slopes"]) == {"operations", "megabytes", "milliseconds"}
    assert (tmp_path / "run" / "scaling.png").stat().st_size > 1000
    assert "sparse grows as operations" in capsys.readouterr().out
