import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.training import leaves
from jaxformer.training.state import TrainState


def params():
    return {"head": {"kernel": jnp.arange(15.0).reshape(5, 3)}, "norm": {"scale": jnp.ones(7)}}


def state(**options):
    return TrainState.create(params(), optax.adam(0.1), jax.random.key(0), **options)


def test_a_run_starts_at_step_0_with_a_fresh_optimizer():
    made = state()
    assert made.step.dtype == jnp.int32
    assert int(made.step) == 0
    moments = jax.tree.leaves(made.opt_state[0].mu)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in moments) == 0
    np.testing.assert_array_equal(made.params["head"]["kernel"], params()["head"]["kernel"])


def test_the_average_starts_at_the_parameters_in_memory_of_its_own():
    made = state(ema=True)
    for mine, average in zip(jax.tree.leaves(made.params), jax.tree.leaves(made.ema)):
        np.testing.assert_array_equal(mine, average)
        assert mine.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()


def test_the_best_parameters_are_the_average_where_there_is_one():
    assert state().best_params["norm"]["scale"] is not None
    plain, averaged = state(), state(ema=True)
    assert plain.best_params is plain.params
    assert averaged.best_params is averaged.ema


def test_it_is_a_tree_whose_leaves_have_names_for_a_checkpoint():
    made = state(ema=True)
    names = list(leaves.named(made))
    assert {"step", "key", "params.head.kernel", "ema.norm.scale"} <= set(names)
    assert len(names) == len(jax.tree.leaves(made)) == 2 + 2 * 2 + 1 + 2 * 2
    assert jax.tree.structure(made) == jax.tree.structure(jax.eval_shape(lambda: state(ema=True)))


def test_what_the_loss_keeps_is_named_in_a_checkpoint_and_nothing_is_where_it_keeps_nothing():
    kept = state(extra={"centre": jnp.zeros(3)})
    assert set(leaves.named(kept)) == set(leaves.named(state())) | {"extra.centre"}
    assert state().extra is None


def test_what_cannot_be_averaged_over_parts_is_refused():
    with pytest.raises(ValueError, match="floating-point arrays only, got int32"):
        state(extra={"centre": jnp.zeros(3), "calls": jnp.zeros((), jnp.int32)})


def test_mapping_over_it_may_give_anything_such_as_shardings():
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state())
    assert shardings.step == state().step.sharding
