"""What JAX's programs multiply, and what their backward passes keep."""

import contextlib
import io
import math
import re

import jax
import pytest
from jax.ad_checkpoint import print_saved_residuals

from experiments.attention_scaling import operations


@pytest.fixture
def size():
    """Counts the numbers in a tree."""
    return lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture
def multiplied():
    """Counts the operations of all products, experts' included."""

    def count(f, *arguments):
        return operations(f, *arguments) + ragged(jax.make_jaxpr(f)(*arguments))

    return count


@pytest.fixture
def factors():
    """Counts the numbers in the factors of all products that do not come from `leaves` alone."""

    def count(f, leaves, *arguments):
        jaxpr = jax.make_jaxpr(f)(leaves, *arguments).jaxpr
        return _factors(jaxpr, [*jaxpr.invars[: len(leaves)], *jaxpr.constvars])

    return count


@pytest.fixture
def residuals():
    """Counts the bytes of what reverse mode keeps, besides what it was given."""

    def count(loss, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            print_saved_residuals(loss, *arguments)
        rows = re.findall(
            r"^(\w+)\[([\d,]*)\] (?!from the argument)", told.getvalue(), re.MULTILINE
        )
        widths = {"f32": 4, "i32": 4, "bool": 1}
        sizes = [math.prod(map(int, filter(None, shape.split(",")))) for _, shape in rows]
        return sum(widths[kind] * size for (kind, _), size in zip(rows, sizes))

    return count


def ragged(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ragged_dot_general":
            total += 2 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[-1]
        for inner, times in within(equation):
            total += ragged(inner) * times
    return total


def within(equation):
    """The programs in an equation, and how often they run."""
    for inner in jax.tree.leaves([*equation.params.values()], is_leaf=is_jaxpr):
        if is_jaxpr(inner):
            yield inner, equation.params.get("length", 1)


def is_jaxpr(x):
    return hasattr(x, "eqns")


def _factors(jaxpr, weights):
    total, weights = 0, set(weights)
    for equation in jaxpr.eqns:
        fixed = [isinstance(x, jax.extend.core.Literal) or x in weights for x in equation.invars]
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            both = zip(equation.invars[:2], fixed)
            total += sum(x.aval.size for x, known in both if not known)
            continue
        for inner, times in within(equation):
            inner = getattr(inner, "jaxpr", inner)
            known = [x for x, at in zip(inner.invars, fixed) if at]
            total += times * _factors(inner, [*known, *inner.constvars])
        if all(fixed):
            weights |= set(equation.outvars)
    return total
