"""What the tests of the models share."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest


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


@pytest.fixture(scope="session")
def program():
    """Writes initialisation and a training step of a module as text, without compiling them."""

    def text(module, *args):
        key = jax.random.key(0)

        def loss(variables):
            return module.apply(variables, *args, train=True, rngs={"dropout": key}).sum()

        written = jax.make_jaxpr(lambda key: jax.grad(loss)(module.init(key, *args)))(key)
        return re.sub("0x[0-9a-f]+", "", str(written))

    return text
