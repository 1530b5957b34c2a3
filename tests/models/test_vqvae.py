"""VQ-VAE: shapes, round trips, what sees what, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ConvCoder, ViTCoder, VQVAEConfig

SIZE, C, P = (12, 20), 3, 15
CODERS = {"conv": ConvCoder(6, 5, 1), "vit": ViTCoder(8, 1, 2, 11)}
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, *SIZE, C)), jnp.float32)
QUANTIZER = quantize.EMAVectorQuantizer(7, 2)
MODELS = {name: VQVAE(VQVAEConfig(SIZE, C, 4, coder), QUANTIZER) for name, coder in CODERS.items()}


@pytest.fixture(params=CODERS, scope="module")
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(0), IMAGES)


@pytest.fixture(scope="module")
def found(model, variables):
    return jax.jit(model.apply)(variables, IMAGES)


def test_an_image_is_a_grid_of_codes_and_the_codes_are_all_of_it(model, variables, found):
    assert model.config.grid == (3, 5)
    ids = jax.jit(lambda v, x: model.apply(v, x, method="encode"))(variables, IMAGES)
    assert ids.shape == (2, P)
    assert (ids == found.ids).all()
    drawn = jax.jit(lambda v, x: model.apply(v, x, method="decode"))(variables, ids)
    assert drawn.shape == IMAGES.shape
    np.testing.assert_allclose(drawn, found.images, atol=1e-5)


def test_distortion_and_use_are_those_of_the_reconstruction(found):
    expected = np.square(np.float64(found.images) - np.float64(IMAGES)).mean()
    assert found.distortion == pytest.approx(expected, rel=1e-5)
    shares = np.bincount(np.ravel(found.ids), minlength=7) / found.ids.size
    shares = shares[shares > 0]
    assert found.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_codes_lie_in_the_order_of_the_patches(model, variables):
    """What a code is decoded to lies nearest to its place."""

    @jax.jit
    def drawn(vectors):
        return model.apply(variables, vectors, method=lambda self, x: self.decoder(x))

    # the third row of patches, the second column
    vectors = jax.random.normal(jax.random.key(1), (1, P, 2))
    moved = jnp.abs(drawn(vectors.at[0, 11].add(1.0)) - drawn(vectors))[0].max(-1)
    weight = np.asarray(moved).reshape(3, 4, 5, 4).sum((1, 3))
    assert np.unravel_index(weight.argmax(), weight.shape) == (2, 1)


def test_training_changes_the_codebook_and_the_parameters_lower_the_loss(model, variables):
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables, state, key):
        def loss(params):
            found, moved = model.apply(
                {**variables, "params": params},
                IMAGES,
                train=True,
                rngs={"quantizer": key},
                mutable=["codebook"],
            )
            return found.distortion + found.quantizer_loss, (found.distortion, moved)

        (_, (distortion, moved)), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        updates, state = optimizer.update(grads, state)
        return (
            {"params": optax.apply_updates(variables["params"], updates), **moved},
            state,
            distortion,
        )

    state, distortions = optimizer.init(variables["params"]), []
    for i in range(40):
        variables, state, distortion = step(variables, state, jax.random.key(i))
        distortions.append(float(distortion))
    assert distortions[-1] < 0.5 * distortions[0]
    assert variables["codebook"]["quantizer"]["averages"]["weight"] > 0.3


def test_every_size_of_the_config_is_read():
    def shapes(config):
        images = jnp.zeros((1, *config.size, config.channels))
        tree = jax.eval_shape(VQVAE(config, QUANTIZER).init, jax.random.key(0), images)
        return jax.tree.map(lambda x: x.shape, tree), images.shape

    for coder in CODERS.values():
        config = VQVAEConfig(SIZE, C, 4, coder)
        whole = shapes(config)
        for change in ({"size": (8, 20)}, {"channels": 2}, {"patch": 2}):
            assert shapes(dataclasses.replace(config, **change)) != whole
        for field in dataclasses.fields(coder):
            if field.name == "num_heads":  # tells how channels are grouped, not how many there are
                continue
            other = dataclasses.replace(coder, **{field.name: 2 * getattr(coder, field.name)})
            assert shapes(dataclasses.replace(config, coder=other)) != whole


def test_the_number_of_heads_is_read():
    variables, vectors = None, []
    for heads in (1, 2):
        model = VQVAE(VQVAEConfig(SIZE, C, 4, ViTCoder(8, 1, heads, 11)), QUANTIZER)
        variables = variables or jax.jit(model.init)(jax.random.key(0), IMAGES)
        vectors.append(jax.jit(lambda v, m=model: m.apply(v, IMAGES, method="encoded"))(variables))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="patch=6"):
        VQVAEConfig((12, 18), 1, 6)
    with pytest.raises(ValueError, match="patch=1"):
        VQVAEConfig((12, 18), 1, 1)
    VQVAEConfig((12, 18), 1, 6, CODERS["vit"])
    with pytest.raises(ValueError, match="4×4 do not divide an image of 12×18"):
        VQVAEConfig((12, 18))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        VQVAEConfig(coder=ConvCoder(width=0))
    with pytest.raises(ValueError, match="D=6 must be a multiple of 4 and of N=2"):
        ViTCoder(6, 1, 2)
    with pytest.raises(ValueError, match=r"\(12, 20, 1\), expected \(12, 20, 3\)"):
        jax.eval_shape(MODELS["conv"].init, jax.random.key(0), IMAGES[..., :1])
