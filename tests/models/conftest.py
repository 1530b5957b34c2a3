"""What the tests of the models share."""

import re

import jax
import pytest


@pytest.fixture(scope="session")
def program():
    """Writes initialisation and a training step of a module as text, without compiling them."""

    def text(module, *args, method="__call__"):
        key = jax.random.key(0)

        options = {"method": method, "rngs": {"dropout": key}}

        def loss(variables):
            return module.apply(variables, *args, train=True, **options).sum()

        written = jax.make_jaxpr(
            lambda key: jax.grad(loss)(module.init(key, *args, method=method))
        )(key)
        return re.sub("0x[0-9a-f]+", "", str(written))

    return text
