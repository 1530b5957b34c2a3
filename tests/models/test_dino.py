"""DINO's heads: cosines with prototypes, of class tokens and of patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.dino import DINO, DINOConfig, DINOHead
from jaxformer.models.vit import ViTConfig

RANDOM = np.random.default_rng(0)
ENCODER = ViTConfig((6, 10), (3, 2), 3, 8, 1, 2, 11, mask_token=True, registers=1)
CONFIG = DINOConfig(ENCODER, prototypes=7, hidden=5, bottleneck=3)
IMAGES = jnp.asarray(RANDOM.random((2, 6, 10, 3)), jnp.float32)
CHOSEN = jnp.asarray([[4, 1, 0], [9, 3, 3]])


@pytest.fixture(scope="module")
def variables(draw):
    return draw(DINO(CONFIG), IMAGES, CHOSEN)


def test_logits_are_cosines_after_three_maps(draw):
    from scipy.special import erf

    head, x = DINOHead(7, 5, 3), jnp.asarray(RANDOM.standard_normal((2, 4, 8)), jnp.float32)
    variables = draw(head, x)
    p = jax.tree.map(np.float64, variables["params"])
    h = np.float64(x)
    for layer in ("first", "second", "third"):
        h = h @ p[layer]["kernel"] + p[layer]["bias"]
        h = h * (1 + erf(h / np.sqrt(2))) / 2 if layer != "third" else h
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    prototypes = p["prototypes"] / np.linalg.norm(p["prototypes"], axis=0)
    np.testing.assert_allclose(head.apply(variables, x), h @ prototypes, atol=1e-5)


def test_patches_are_those_asked_for_by_a_head_of_their_own(variables):
    model = DINO(CONFIG)
    found = model.apply(variables, IMAGES, CHOSEN)
    x = model.apply(variables, IMAGES, method="encode")
    np.testing.assert_allclose(found.features, x[:, 0], atol=1e-6)
    params = variables["params"]
    head = DINOHead(7, 5, 3)
    np.testing.assert_allclose(
        found.tokens, head.apply({"params": params["head"]}, x[:, 0]), atol=1e-6
    )
    rows = np.take_along_axis(np.asarray(x[:, 2:]), np.asarray(CHOSEN)[..., None], axis=1)
    patch_head = {"params": params["patch_head"]}
    np.testing.assert_allclose(found.patches, head.apply(patch_head, jnp.asarray(rows)), atol=1e-5)
    assert model.apply(variables, IMAGES).patches is None


def test_patches_may_share_the_head_of_the_class_token(draw):
    model = DINO(dataclasses.replace(CONFIG, shared=True))
    variables = draw(model, IMAGES, CHOSEN)
    assert {*variables["params"]} == {"encoder", "head"}
    assert model.apply(variables, IMAGES, CHOSEN).patches.shape == (2, 3, 7)


def test_a_smaller_crop_is_scored_too_and_hidden_patches_are_not_seen(variables):
    model = DINO(CONFIG)
    assert model.apply(variables, IMAGES[:, :3, :6]).tokens.shape == (2, 7)
    hidden = jnp.ones((2, 10), bool)
    one, other = (model.apply(variables, x, hidden=hidden).tokens for x in (IMAGES, IMAGES[::-1]))
    np.testing.assert_array_equal(one, other)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="the encoder needs one"):
        DINOConfig(dataclasses.replace(ENCODER, class_token=False, pool="mean"))
    with pytest.raises(ValueError, match="sizes must be positive"):
        dataclasses.replace(CONFIG, prototypes=0)
