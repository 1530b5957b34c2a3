"""Losses of filling in beside PyTorch and a published masked autoencoder's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import losses, patches, reconstruction

RANDOM = np.random.default_rng(0)
B, P, D = 3, 4, 12
PREDICTED = jnp.asarray(RANDOM.standard_normal((B, P, D)), jnp.float32)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_on_hidden_patches_is_that_of_transformers(normalise):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    one = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    decoder = {f"decoder_{name}": number for name, number in one.items()}
    config = transformers.ViTMAEConfig(
        image_size=8, patch_size=2, norm_pix_loss=normalise, **one, **decoder
    )
    images = RANDOM.random((B, 8, 8, 3)).astype(np.float32)
    model = transformers.ViTMAEForPreTraining(config)
    output = model(torch.tensor(images.transpose(0, 3, 1, 2)))
    output.logits.retain_grad()
    output.loss.backward()

    target = patches.patchify(jnp.asarray(images), (2, 2))
    target = reconstruction.normalised_patches(target) if normalise else target
    mask = jnp.asarray(output.mask.bool().numpy())

    def loss(predicted):
        return losses.masked_mean(reconstruction.squared_error(predicted, target), mask)

    found, slope = jax.value_and_grad(loss)(jnp.asarray(output.logits.detach().numpy()))
    np.testing.assert_allclose(found, output.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, output.logits.grad, atol=1e-6)
    assert 0 < mask.sum() < mask.size


def test_normalised_patches_forget_brightness_and_contrast():
    x = PREDICTED[0]
    found = reconstruction.normalised_patches(x)
    np.testing.assert_allclose(found.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(found.var(axis=-1, ddof=1), 1, rtol=1e-4)
    np.testing.assert_allclose(reconstruction.normalised_patches(5 * x + 2), found, atol=1e-5)
    assert (reconstruction.normalised_patches(jnp.full((P, D), 0.5)) == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_smooth_l1_and_its_gradient_are_pytorchs(beta):
    torch = pytest.importorskip("torch")
    predicted = torch.tensor(np.asarray(PREDICTED), requires_grad=True)
    target = np.zeros((B, P, D), np.float32)
    function = torch.nn.functional.smooth_l1_loss
    expected = function(predicted, torch.tensor(target), beta=beta, reduction="none").mean(dim=-1)
    expected.sum().backward()

    def loss(predicted):
        return reconstruction.smooth_l1(predicted, jnp.asarray(target), beta=beta)

    np.testing.assert_allclose(loss(PREDICTED), expected.detach(), rtol=1e-5)
    slope = jax.grad(lambda x: loss(x).sum())(PREDICTED)
    np.testing.assert_allclose(slope, predicted.grad, atol=1e-6)


def test_narrow_numbers_are_computed_wide():
    x, y = jnp.asarray(PREDICTED, jnp.bfloat16), jnp.asarray(PREDICTED[::-1], jnp.bfloat16)
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    for f in (reconstruction.squared_error, reconstruction.smooth_l1):
        assert f(x, y).dtype == jnp.float32
        np.testing.assert_array_equal(f(x, y), f(*wide))
    assert reconstruction.normalised_patches(x).dtype == jnp.float32


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="D=1"):
        reconstruction.normalised_patches(jnp.zeros((P, 1)))
    with pytest.raises(ValueError, match=r"beta >= 0, got -1\.0"):
        reconstruction.smooth_l1(jnp.zeros((P, D)), jnp.zeros((P, D)), beta=-1.0)
