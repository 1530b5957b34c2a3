"""Losses of a student against its teacher, and targets, beside PyTorch written from the papers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.ops import distillation

RANDOM = np.random.default_rng(0)
VIEWS, TAUGHT, B, P, V = 5, 2, 3, 7, 11
LOGITS = jnp.asarray(RANDOM.standard_normal((VIEWS, B, V)), jnp.float32)
TAUGHT_LOGITS = jnp.asarray(RANDOM.standard_normal((TAUGHT, B, V)), jnp.float32)
PATCHES = jnp.asarray(RANDOM.standard_normal((2, B, P, V)), jnp.float32)
HIDDEN = jnp.asarray(RANDOM.random((B, P)) < 0.5).at[1].set(False)
TARGETS = jax.nn.softmax(TAUGHT_LOGITS / 0.05)
PATCH_TARGETS = jax.nn.softmax(PATCHES[1] / 0.05)


def test_dino_is_the_papers_double_loop_and_so_is_its_gradient():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(np.asarray(LOGITS), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(np.asarray(TARGETS), dtype=torch.float64)
    pairs = []
    for t in range(TAUGHT):
        for s in range(VIEWS):
            if s != t:
                log_p = torch.log(torch.softmax(logits[s] / 0.1, dim=-1))
                pairs.append((-targets[t] * log_p).sum(dim=-1).mean())
    expected = sum(pairs) / len(pairs)
    expected.backward()
    found, slope = jax.jit(jax.value_and_grad(distillation.dino_loss))(LOGITS, TARGETS)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(slope, logits.grad, atol=1e-5)


def test_dino_compares_no_view_with_itself():
    influence = jax.jacobian(lambda x: distillation.dino_loss(x, TARGETS[:1]))(LOGITS)
    assert (influence[0] == 0).all()
    assert (jnp.abs(influence[1:]).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(("views", "taught"), [(1, 1), (2, 3), (3, 0)])
def test_dino_without_pairs_is_refused(views, taught):
    with pytest.raises(ValueError, match=f"{views} of the student, {taught} taught"):
        distillation.dino_loss(jnp.zeros((views, B, V)), jnp.zeros((taught, B, V)))


def test_ibot_is_a_mean_over_images_of_means_over_their_hidden_patches():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(np.asarray(PATCHES[0]), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(np.asarray(PATCH_TARGETS), dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for image in range(B):
        for patch in np.flatnonzero(HIDDEN[image]):
            log_p = torch.log_softmax(logits[image, patch] / 0.2, dim=-1)
            expected = (
                expected - (targets[image, patch] * log_p).sum() / int(HIDDEN[image].sum()) / B
            )
    expected.backward()
    loss = functools.partial(distillation.ibot_loss, temperature=0.2)
    found, slope = jax.jit(jax.value_and_grad(loss))(PATCHES[0], PATCH_TARGETS, HIDDEN)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(slope, logits.grad, atol=1e-5)


def test_patches_that_are_not_hidden_may_hold_anything():
    at = HIDDEN[..., None]
    spoilt = jnp.where(at, PATCHES[0], jnp.nan), jnp.where(at, PATCH_TARGETS, jnp.nan)
    grad_fn = jax.value_and_grad(distillation.ibot_loss)
    found, slope = grad_fn(spoilt[0], spoilt[1], HIDDEN)
    assert found == distillation.ibot_loss(PATCHES[0], PATCH_TARGETS, HIDDEN)
    assert (slope[~HIDDEN] == 0).all()
    assert (jnp.abs(slope[HIDDEN]).max(axis=-1) > 0).all()


def test_a_student_that_says_what_the_teacher_says_has_no_gradient():
    same = jnp.log(TARGETS[:1]) * 0.1
    slope = jax.grad(distillation.dino_loss)(jnp.tile(same, (2, 1, 1)), TARGETS[:1])
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_the_centre_follows_the_mean_and_is_taken_from_the_logits():
    torch = pytest.importorskip("torch")
    centre, logits = (torch.tensor(np.asarray(x)) for x in (LOGITS[0, 0], TAUGHT_LOGITS))
    expected = centre * 0.8 + logits.flatten(0, 1).mean(dim=0) * 0.2
    found = distillation.update_centre(LOGITS[0, 0], TAUGHT_LOGITS, momentum=0.8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    targets = torch.softmax((logits - centre) / 0.07, dim=-1)
    found = jax.jit(distillation.centred_softmax)(TAUGHT_LOGITS, LOGITS[0, 0], 0.07)
    np.testing.assert_allclose(found, targets, atol=1e-6)


def sinkhorn_of_the_papers(logits, temperature, iterations=3):
    """SwAV's appendix, in float64: joint probabilities, scaled to marginals 1/V and 1/B."""
    torch = pytest.importorskip("torch")
    q = torch.exp(torch.tensor(np.asarray(logits), dtype=torch.float64) / temperature).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


ROWS = jnp.asarray(RANDOM.standard_normal((24, V)), jnp.float32)
SINKHORN = jax.jit(distillation.sinkhorn, static_argnames="iterations")


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_papers(iterations):
    expected = sinkhorn_of_the_papers(ROWS, 0.3, iterations)
    found = SINKHORN(ROWS, 0.3, iterations=iterations)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sinkhorn_rows_sum_to_one_and_columns_to_their_share():
    np.testing.assert_allclose(SINKHORN(ROWS, 0.3).sum(axis=1), 1, rtol=1e-5)
    balanced = SINKHORN(ROWS, 0.5, iterations=200)
    np.testing.assert_allclose(balanced.sum(axis=0), 24 / V, rtol=1e-4)
    np.testing.assert_allclose(balanced.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_balances_the_whole_batch_on_whatever_devices_it_lies():
    devices = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.device_put(ROWS, NamedSharding(devices, PartitionSpec("data")))
    np.testing.assert_allclose(SINKHORN(spread, 0.3), SINKHORN(ROWS, 0.3), atol=1e-6)


def test_sinkhorn_leaves_out_rows_that_do_not_count():
    where = jnp.arange(24) % 3 != 1
    spoilt = jnp.where(where[:, None], ROWS, jnp.nan)
    found = SINKHORN(spoilt, 0.3, where=where)
    np.testing.assert_allclose(found[where], SINKHORN(ROWS[where], 0.3), atol=1e-6)
    assert (found[~where] == 0).all()
    with jax.debug_nans(True):
        assert (SINKHORN(ROWS, 0.3, where=jnp.zeros(24, bool)) == 0).all()


def test_sinkhorn_of_logits_that_would_overflow_is_finite():
    found = SINKHORN(ROWS * 100, 0.04)
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="iterations >= 1, got 0"):
        distillation.sinkhorn(ROWS, 0.3, iterations=0)


def test_no_gradient_reaches_a_teacher():
    def loss(logits, centre, patches, rows):
        targets = distillation.centred_softmax(logits, centre, 0.07)
        moved = distillation.update_centre(centre, logits)
        return (
            distillation.dino_loss(LOGITS, logits)
            + distillation.ibot_loss(PATCHES[0], patches, HIDDEN)
            + (moved * targets[0, 0]).sum()
            + (distillation.sinkhorn(rows, 0.3) * ROWS).sum()
        )

    slopes = jax.grad(loss, argnums=(0, 1, 2, 3))(TARGETS, LOGITS[0, 0], PATCH_TARGETS, ROWS)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_narrow_logits_are_computed_wide():
    narrow, patches = jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(PATCHES, jnp.bfloat16)
    wide, wide_patches = narrow.astype(jnp.float32), patches.astype(jnp.float32)
    for f, x, same in (
        (lambda x: distillation.dino_loss(x, TARGETS), narrow, wide),
        (lambda x: distillation.ibot_loss(x, PATCH_TARGETS, HIDDEN), patches[0], wide_patches[0]),
        (lambda x: distillation.centred_softmax(x, jnp.zeros(V), 0.07), narrow, wide),
        (lambda x: distillation.update_centre(jnp.zeros(V), x), narrow, wide),
        (lambda x: distillation.sinkhorn(x, 0.3), narrow[0], wide[0]),
    ):
        assert f(x).dtype == jnp.float32
        np.testing.assert_array_equal(f(x), f(same))
