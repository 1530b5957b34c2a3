"""What the tests of the layers share."""

import functools

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
