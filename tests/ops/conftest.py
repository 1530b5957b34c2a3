"""What the tests of the ops share."""

import jaxtyping
import pytest


@pytest.fixture
def untyped():
    """Turns shape checking of signatures off, as it is for users, so that our own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
