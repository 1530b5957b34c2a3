"""Quantisers: one contract for all, and the codebook that follows its inputs through a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.layers import quantize
from jaxformer.ops import codebook
from jaxformer.training import mesh
from jaxformer.training.state import TrainState
from jaxformer.training.step import jit_step, make_train_step, pmap_step

B, P, D, E = 8, 5, 3, 11
X = jax.random.normal(jax.random.key(1), (B, P, 7))
KEY = {"quantizer": jax.random.key(2)}
LAYERS = {
    "vq": quantize.VectorQuantizer(E, D),
    "vq_ema": quantize.EMAVectorQuantizer(E, D),
    "fsq": quantize.FSQ((2, 5, 3)),
    "gumbel": quantize.GumbelQuantizer(E, D, divergence=0.5),
}
VARIABLES = {name: layer.init(jax.random.key(0), X) for name, layer in LAYERS.items()}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def into(name):
    kernel, bias = (VARIABLES[name]["params"]["into"][part] for part in ("kernel", "bias"))
    return X @ kernel + bias[None, None]


def test_what_a_quantiser_gives_are_the_vectors_of_its_ids(name):
    layer, variables = LAYERS[name], VARIABLES[name]
    found = layer.apply(variables, X)
    assert found.ids.shape == (B, P)
    assert found.ids.dtype == jnp.int32
    assert found.loss.shape == ()
    assert found.ids.min() >= 0
    assert found.ids.max() < layer.vocab_size
    assert len(np.unique(found.ids)) > 2
    looked_up = layer.apply(variables, found.ids, method="lookup")
    np.testing.assert_allclose(found.vectors, looked_up, atol=1e-6)
    narrow = layer.apply(variables, X.astype(jnp.bfloat16))
    assert narrow.vectors.dtype == jnp.bfloat16
    assert narrow.loss.dtype == jnp.float32


def test_every_quantiser_lets_gradients_reach_what_came_before(name):
    layer, variables = LAYERS[name], VARIABLES[name]

    def total(x):
        options = {"train": True, "rngs": KEY, "mutable": ["codebook"]}
        return layer.apply(variables, x, **options)[0].vectors.sum()

    assert (jnp.abs(jax.grad(total)(X)).max((0, 1)) > 0).all()


def test_codes_are_the_nearest_and_losses_have_their_weights():
    z = into("vq")
    variables = VARIABLES["vq"]
    found = LAYERS["vq"].apply(variables, X)
    codes = np.asarray(variables["params"]["codes"], np.float64)
    squares = np.square(np.asarray(z, np.float64)[..., None, :] - codes).sum(-1)
    assert (found.ids == squares.argmin(-1)).all()
    assert found.loss == pytest.approx(1.25 * squares.min(-1).mean() / D, rel=1e-4)

    followed = LAYERS["vq_ema"].apply(VARIABLES["vq_ema"], X)
    z, q = into("vq_ema"), followed.vectors
    assert followed.loss == pytest.approx(0.25 * float(jnp.square(z - q).mean()), rel=1e-4)
    assert LAYERS["fsq"].apply(VARIABLES["fsq"], X).loss == 0
    divergence = codebook.kl_to_uniform(into("gumbel")).mean()
    assert LAYERS["gumbel"].apply(VARIABLES["gumbel"], X).loss == pytest.approx(divergence / 2)


def test_the_relaxed_quantiser_mixes_in_training_and_chooses_otherwise():
    layer, variables = LAYERS["gumbel"], VARIABLES["gumbel"]
    options = {"train": True, "rngs": KEY}
    warm = layer.apply(variables, X, temperature=2.0, **options)
    weights = codebook.gumbel_weights(into("gumbel"), 2.0)
    assert np.abs(warm.vectors - weights @ variables["params"]["codes"]).max() > 0.1  # noise
    cold = layer.apply(variables, X, temperature=1e-4, **options)
    distances = jnp.abs(cold.vectors[..., None, :] - variables["params"]["codes"][None, None])
    assert distances.max(-1).min(-1).max() < 1e-3
    assert (layer.apply(variables, X).ids == into("gumbel").argmax(-1)).all()


def test_averages_move_in_training_only_and_start_with_their_codes():
    layer, variables = LAYERS["vq_ema"], VARIABLES["vq_ema"]
    first = variables["codebook"]["averages"]
    assert first["weight"] == 0
    assert set(variables["params"]) == {"into"}
    codes = layer.apply(variables, jnp.arange(E), method="lookup")
    assert (codes == first["sums"]).all()
    assert codes.std() > 0.5

    found, moved = layer.apply(variables, X, train=True, rngs=KEY, mutable=["codebook"])
    start = codebook.start_averages(codes)
    expected = codebook.update_averages(start, into("vq_ema"), found.ids, 0.99)
    for part, leaf in expected._asdict().items():
        np.testing.assert_allclose(moved["codebook"]["averages"][part], leaf, rtol=1e-5, atol=1e-7)
    _, same = layer.apply(variables, X, mutable=["codebook"])
    assert same["codebook"]["averages"]["weight"] == 0


def test_codes_that_nobody_chose_are_revived_at_the_next_step_unless_told_not_to():
    def after_two_steps(layer):
        variables = VARIABLES["vq_ema"]
        for _ in range(2):
            options = {"train": True, "rngs": KEY, "mutable": ["codebook"]}
            _, moved = layer.apply(variables, X, **options)
            variables = {**variables, **moved}
        return np.asarray(variables["codebook"]["averages"]["counts"])

    assert (after_two_steps(quantize.EMAVectorQuantizer(E, D)) > 0).all()
    assert not (after_two_steps(quantize.EMAVectorQuantizer(E, D, revive_below=0.0)) > 0).all()


@pytest.mark.parametrize("spread", [jit_step, pmap_step])
def test_the_averages_of_eight_devices_are_those_of_the_whole_batch(spread):
    layer = quantize.EMAVectorQuantizer(E, D, decay=0.5, revive_below=0.0)

    def loss(params, batch, key, state):
        variables = {"params": params, **state.extra}
        found, extra = layer.apply(variables, batch, train=True, mutable=["codebook"])
        return found.loss, ({}, extra)

    def run(step):
        variables = jax.tree.map(jnp.copy, VARIABLES["vq_ema"])
        params, extra = variables.pop("params"), variables
        state = TrainState.create(params, optax.sgd(0.1), jax.random.key(0), extra=extra)
        for _ in range(3):
            state, _ = step(state, np.asarray(X))
        averages = state.extra["codebook"]["averages"]
        return jax.device_get(codebook.averaged_codes(codebook.Averages(**averages)))

    pure = make_train_step(loss, optax.sgd(0.1), stateful=True)
    one = run(jit_step(pure, mesh.make("data=1")))
    eight = run(spread(pure, mesh.make("data=8")))
    np.testing.assert_allclose(one, eight, atol=1e-3 if spread is pmap_step else 1e-5)
