"""Stops are read from every form, and found at the end of a text only."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.generation import stops


def test_every_form_is_a_tuple_of_sequences():
    for stop, expected in (
        (None, ()),
        ((), ()),
        (7, ((7,),)),
        (np.int64(7), ((7,),)),
        ([7, 9], ((7,), (9,))),
        ([[7, 9]], ((7, 9),)),
        ((7, [8, 9]), ((7,), (8, 9))),
    ):
        assert stops.sequences(stop) == expected
    assert stops.longest(()) == 0
    assert stops.longest(((1,), (2, 3, 4), (5, 6))) == 3


def test_only_the_end_counts_and_all_of_a_sequence():
    recent = jnp.asarray([[1, 2, 3], [2, 3, 1], [-1, -1, 3], [-1, 2, 3], [3, 3, 2], [0, 0, 7]])
    np.testing.assert_array_equal(stops.ended(recent, ((2, 3), (7,))), [1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(stops.ended(recent, ((1, 2, 3),)), [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(stops.ended(recent, ()), [0] * 6)


def test_bad_stops_are_named_in_the_error():
    for stop in (((),), [4, []]):
        with pytest.raises(ValueError, match="stop sequence has no tokens"):
            stops.sequences(stop)
    for stop in (-1, (3, (4, -2))):
        with pytest.raises(ValueError, match="negative"):
            stops.sequences(stop)
