"""Schedules of a moving average against their formulas, and what averages do at the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.training import ema


def test_a_cosine_starts_and_ends_where_it_should_and_stays_there():
    schedule = ema.cosine(0.9, 0.5, 8)
    found = [float(schedule(step)) for step in (0, 2, 4, 8, 9, 1000)]
    between = 0.5 + 0.4 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(found, [0.9, between, 0.7, 0.5, 0.5, 0.5], rtol=1e-6)


def test_a_teacher_that_has_arrived_at_one_no_longer_moves():
    schedule = jax.jit(ema.cosine(0.996, 1.0, 7))
    assert float(schedule(jnp.int32(7))) == 1.0
    assert float(schedule(jnp.int32(0))) == np.float32(0.996)


def test_the_ramp_rises_to_its_limit():
    found = [float(ema.ramped(0.2)(step)) for step in range(3)]
    np.testing.assert_allclose(found, [0.1, 2 / 11, 0.2], rtol=1e-6)


def test_an_average_lies_between_and_keeps_its_dtype():
    old, new = {"a": jnp.zeros(3)}, {"a": jnp.full(3, 4.0)}
    for decay, expected in ((0.0, 4.0), (0.25, 3.0), (1.0, 0.0)):
        found = ema.follow(old, new, decay)["a"]
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.full(3, expected))


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        ema.cosine(0.9, 1.0, 0)
    with pytest.raises(ValueError, match=r"ema_decay=1\.0"):
        ema.ramped(1.0)
