"""Masked autoencoders, JEPA and their predictor: what reaches what, and in which order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.jepa import JEPA, JEPAConfig
from jaxformer.models.mae import MAE, MAEConfig
from jaxformer.models.predictor import Predictor, PredictorConfig
from jaxformer.models.vit import ViTConfig
from jaxformer.ops import patches
from jaxformer.ops.attention import key_lengths

RANDOM = np.random.default_rng(0)
ENCODER = ViTConfig((6, 10), (3, 2), 3, 8, 1, 2, 11, positions="sinusoidal")
IMAGES = jnp.asarray(RANDOM.random((2, 6, 10, 3)), jnp.float32)
ORDER = np.stack([RANDOM.permutation(10) for _ in range(2)])
KEEP, HIDE = jnp.asarray(ORDER[:, :3]), jnp.asarray(ORDER[:, 3:])
CONFIG = PredictorConfig(12, 1, 3, 7, outputs=8, mask_tokens=2)
SEEN = jnp.asarray(RANDOM.standard_normal((2, 4, 8)), jnp.float32)
CHANGES = {
    "width": 24,
    "num_layers": 2,
    "num_heads": 1,
    "hidden": 5,
    "outputs": 3,
    "positions": "learned",
    "mask_tokens": 1,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PredictorConfig)])
def test_every_field_is_read(program, field):
    changed = dataclasses.replace(CONFIG, **{field: CHANGES[field]})
    one, other = (program(Predictor(x, ENCODER), SEEN, KEEP, HIDE) for x in (CONFIG, changed))
    assert one != other


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_a_prediction_knows_the_places_but_not_the_order(draw, positions):
    model = Predictor(dataclasses.replace(CONFIG, positions=positions), ENCODER)
    variables, apply = draw(model, SEEN, KEEP, HIDE), jax.jit(model.apply)
    told = apply(variables, SEEN, KEEP, HIDE)
    assert told.shape == (2, 10, 8)
    swapped = jnp.concatenate([SEEN[:, :1], SEEN[:, :0:-1]], axis=1)
    other = apply(variables, swapped, KEEP[:, ::-1], HIDE[:, ::-1])
    np.testing.assert_allclose(other[:, :3], told[:, 2::-1], atol=1e-5)
    np.testing.assert_allclose(other[:, 3:], told[:, :2:-1], atol=1e-5)
    moved = apply(variables, SEEN, KEEP[:, ::-1], HIDE)
    assert np.abs(moved - told).max() > 0.01
    assert np.abs(told[:, 3:] - told[:, 3:4]).max() > 0.01


def test_mask_tokens_are_chosen_and_counted_around(draw):
    model = Predictor(CONFIG, ENCODER)
    variables = draw(model, SEEN, KEEP, HIDE)
    apply = jax.jit(model.apply, static_argnames="which")
    first, second, third = (apply(variables, SEEN, KEEP, HIDE, which=n) for n in range(3))
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 0.01


def test_padding_of_the_seen_that_may_not_be_read_changes_nothing(draw):
    model = Predictor(CONFIG, ENCODER)
    variables, apply = draw(model, SEEN, KEEP, HIDE), jax.jit(model.apply)
    short = apply(variables, SEEN, KEEP, HIDE)
    # Targets first, the seen after them: the padding is at the end.
    allowed = key_lengths(jnp.array([11, 11]))
    padded = jnp.concatenate([HIDE, KEEP[:, :0]], axis=1)
    long = apply(variables, SEEN, KEEP, jnp.pad(padded, ((0, 0), (0, 2))), allowed)
    np.testing.assert_allclose(long[:, :10], short, atol=1e-5)


def test_a_masked_autoencoder_sees_the_kept_patches_alone_and_paints_in_order(draw):
    model = MAE(MAEConfig.of(ENCODER, 12, 1, 3))
    variables, apply = draw(model, IMAGES, KEEP, HIDE), jax.jit(model.apply)
    told = apply(variables, IMAGES, KEEP, HIDE)
    assert told.shape == (2, 10, 3 * 2 * 3)
    again = apply(variables, IMAGES, KEEP[:, ::-1], HIDE[:, ::-1])
    np.testing.assert_allclose(again, told, atol=1e-5)
    influence = jax.grad(lambda x: jnp.sin(apply(variables, x, KEEP, HIDE)).sum())(IMAGES)
    touched = np.abs(patches.patchify(influence, (3, 2))).max(-1) > 0
    assert [set(np.flatnonzero(row)) for row in touched] == [{*row} for row in ORDER[:, :3]]
    lengths = {
        x.shape[-3] for x in shapes_of(lambda: apply(variables, IMAGES, KEEP, HIDE)) if x.ndim == 4
    }
    assert 1 + 3 in lengths  # of the encoder's queries: the class token and a few patches


def shapes_of(f):
    """Everything computed inside."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval for x in equation.outvars)
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from inside(value.jaxpr)

    return list(inside(jax.make_jaxpr(f)().jaxpr))


def test_jepa_predicts_vectors_and_encodes_whole_images(draw):
    model = JEPA(JEPAConfig.of(ENCODER, 12, 1, 3))
    variables, apply = draw(model, IMAGES, KEEP, HIDE[:, :2]), jax.jit(model.apply)
    told = apply(variables, IMAGES, KEEP, HIDE[:, :2])
    assert told.shape == (2, 2, 8)
    alone = apply(variables, IMAGES, KEEP, HIDE[:, :1])
    assert np.abs(alone - told[:, :1]).max() > 1e-4  # targets of a block read each other
    whole = model.apply(variables, IMAGES, method="encode")
    seen = model.apply(variables, IMAGES, keep=KEEP, method="encode")
    assert whole.shape == (2, 11, 8)
    found = model.apply(variables, seen, KEEP, HIDE[:, :2], method="predict")
    np.testing.assert_allclose(found, told, atol=1e-5)


def test_images_with_patches_that_have_no_place_are_refused(draw):
    for model in (JEPA(JEPAConfig.of(ENCODER, 12, 1, 3)), MAE(MAEConfig.of(ENCODER, 12, 1, 3))):
        variables = draw(model, IMAGES, KEEP, HIDE)
        half = model.apply(variables, IMAGES[:, :3], KEEP[:, :2] % 5, HIDE[:, :3] % 5)
        assert half.shape[0] == 2
        for other in (jnp.zeros((2, 9, 10, 3)), jnp.zeros((2, 6, 8, 3))):
            with pytest.raises(ValueError, match="predicted in images of 6×10, got"):
                model.apply(variables, other, KEEP, HIDE)


def test_v_jepa_2_has_the_published_sizes():
    config = JEPAConfig.v_jepa_2(1024, 24, 16, 4096)
    assert config.encoder.grid == (32, 16, 16)
    clip = jax.ShapeDtypeStruct((1, *config.encoder.size, 3), jnp.float32)
    few = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(JEPA(config).init, jax.random.key(0), clip, few, few)["params"]
    sizes = {name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params}
    assert sizes == {"encoder": 303_885_312, "predictor": 22_086_016}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MAEConfig(ENCODER, CONFIG), "a patch has 18 numbers, got outputs=8"),
        (lambda: JEPAConfig(dataclasses.replace(ENCODER, width=16), CONFIG), "D=16, got outputs=8"),
        (lambda: dataclasses.replace(CONFIG, positions="none"), "positions must be one of"),
        (lambda: dataclasses.replace(CONFIG, num_heads=5), "D=12 is not a multiple of N=5"),
        (lambda: dataclasses.replace(CONFIG, mask_tokens=0), "must be positive"),
    ],
)
def test_nonsense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
