"""The checks that users are given find what they are there to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import testing

X = jax.random.normal(jax.random.key(0), (7, 3))


def test_a_running_sum_is_causal_but_not_strictly():
    testing.assert_causal(lambda x: jnp.cumsum(x, axis=0), X)
    with pytest.raises(AssertionError, match="output 0 sees input 0"):
        testing.assert_causal(lambda x: jnp.cumsum(x, axis=0), X, strictly=True)


def test_a_shifted_sum_is_strictly_causal():
    def shifted(x):
        return jnp.cumsum(x, axis=0) - x

    testing.assert_causal(shifted, X, strictly=True)
    with pytest.raises(AssertionError, match="output 0 does not see input 0"):
        testing.assert_causal(shifted, X)


def test_a_leak_of_one_input_into_one_output_is_found():
    with pytest.raises(AssertionError, match="output 2 sees input 5"):
        testing.assert_causal(lambda x: jnp.cumsum(x, axis=0).at[2].add(1e-12 * x[5]), X)


def test_a_leak_that_leaves_the_sum_of_outputs_alone_is_found():
    with pytest.raises(AssertionError, match="output 0 sees input 1"):
        testing.assert_causal(lambda x: jax.nn.softmax(x * x[::-1].sum() + x, axis=-1), X)


def test_a_function_that_changes_the_length_is_refused():
    with pytest.raises(AssertionError, match=r"T=7.*T=6"):
        testing.assert_causal(lambda x: x[1:], X)


def test_equivariance_is_told_from_its_absence():
    def flip(x):
        return x[::-1]

    testing.assert_equivariant(lambda x: jnp.tanh(x) - x.mean(axis=0)[None], X, flip, flip)
    with pytest.raises(AssertionError, match="Mismatch"):
        testing.assert_equivariant(lambda x: jnp.cumsum(x, axis=0), X, flip, flip)


def test_a_transformation_that_changes_nothing_checks_nothing():
    with pytest.raises(AssertionError, match="left the input as it was"):
        testing.assert_equivariant(jnp.tanh, X, lambda x: x, lambda x: x)


def test_outputs_of_another_structure_are_told():
    with pytest.raises(AssertionError, match="structure"):
        testing.assert_equivariant(lambda x: x, X, lambda x: 2 * x, lambda x: (x,))


def test_case_names_are_unique_and_draws_repeat():
    cases = testing.attention_cases()
    assert len({case.name for case in cases}) == len(cases)
    one, other = cases[0].inputs(3), cases[0].inputs(3)
    assert np.array_equal(one["q"], other["q"])
    assert not np.array_equal(one["q"], cases[0].inputs(4)["q"])


def test_some_cases_have_rows_that_may_look_nowhere():
    blind = [
        case.name
        for case in testing.attention_cases()
        if case.mask
        and not case.mask(case).dense(case.query_length, case.key_length).any(axis=-1).all()
    ]
    assert {"key_lengths", "explicit_empty", "window_strict_past", "sinks_over_nothing"} <= {*blind}
