import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.training import optimizers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {
    "embed": {"table": normal(0, 11, 5)},
    "layers_0": {"up": {"kernel": normal(1, 5, 7), "bias": normal(2, 7)}},
    "layers_1": {"norm": {"scale": normal(3, 5)}},
    "scanned": {
        "layers": {
            "up": {"kernel": normal(4, 3, 5, 7), "bias": normal(5, 3, 7)},
            "norm": {"scale": normal(6, 3, 5)},
        }
    },
    "head": {"kernel": normal(7, 5, 2)},
}
HIDDEN = ("layers_0.up.kernel", "scanned.layers.up.kernel")
MATRICES = (*HIDDEN, "embed.table", "head.kernel")


def named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in paths}


def gradients(seed, scale=1.0):
    return jax.tree.map(lambda x: scale * normal(seed + x.size, *x.shape), PARAMS)


def updates(optimizer, *all_gradients):
    """What the optimizer adds to the parameters, which stay where they are, after each gradient."""
    state, found = optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for each in all_gradients:
        change, state = update(each, state, PARAMS)
        found.append(named(change))
    return found


def recipes(**options):
    return [
        optimizers.adamw(0.1, **options),
        optimizers.muon(0.1, 0.1, **options),
    ]


def test_five_steps_of_adamw_are_the_formula():
    rate, decay, b1, b2 = 0.03, 0.2, 0.9, 0.95
    optimizer = optimizers.adamw(rate, weight_decay=decay, b1=b1, b2=b2, clip_norm=1e9)
    params = {"kernel": normal(0, 5, 3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    p, m, v = np.asarray(params["kernel"], np.float64), 0.0, 0.0
    for t in range(1, 6):
        g = normal(t, 5, 3)
        change, state = update({"kernel": g}, state, params)
        params = optax.apply_updates(params, change)
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * p)
    np.testing.assert_allclose(params["kernel"], p, atol=1e-6)


def test_five_steps_of_adamw_are_those_of_torch():
    torch = pytest.importorskip("torch")
    start = np.asarray(normal(0, 5, 3))
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.9), weight_decay=0.2)
    optimizer = optimizers.adamw(0.03, weight_decay=0.2, b1=0.8, b2=0.9, clip_norm=0.7)
    ours, state = {"kernel": jnp.asarray(start)}, None
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for seed in range(5):
        gradient = normal(seed, 5, 3) * 10.0**-seed
        theirs.grad = torch.tensor(np.asarray(gradient))
        torch.nn.utils.clip_grad_norm_([theirs], 0.7)
        reference.step()
        change, state = update({"kernel": gradient}, state, ours)
        ours = optax.apply_updates(ours, change)
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("index", [0, 1], ids=["adamw", "muon"])
def test_the_whole_gradient_is_clipped_to_one_norm(index):
    def clipped(tree, norm):
        return jax.tree.map(lambda x: x * min(1.0, norm / float(optax.tree.norm(tree))), tree)

    # Adam and Muon forget the scale of a first gradient, so a second, smaller one must follow.
    both = gradients(0, scale=50.0), gradients(1, scale=0.01)
    assert float(optax.tree.norm(both[1])) < 1
    found = updates(recipes(clip_norm=1.0)[index], *both)[1]
    expected = updates(recipes(clip_norm=1e9)[index], *(clipped(g, 1.0) for g in both))[1]
    unclipped = updates(recipes(clip_norm=1e9)[index], *both)[1]
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5)
        assert np.abs(found[name] - unclipped[name]).max() > 1e-3


@pytest.mark.parametrize("index", [0, 1], ids=["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not_be_they_scanned_or_not(index):
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    (found,) = updates(recipes(weight_decay=0.3)[index], nothing)
    for name, leaf in named(PARAMS).items():
        expected = -0.1 * 0.3 * leaf if name in MATRICES else 0 * leaf
        np.testing.assert_allclose(found[name], expected, atol=1e-7, err_msg=name)


@functools.cache
def muon_without_decay():
    optimizer = optimizers.muon(0.1, 0.01, weight_decay=0.0, clip_norm=1e9)
    return updates(optimizer, gradients(0), gradients(1))


def test_muon_makes_hidden_kernels_orthogonal_and_wide_ones_larger():
    for found in muon_without_decay():
        for kernel in (found["layers_0.up.kernel"], *found["scanned.layers.up.kernel"]):
            values = np.linalg.svd(kernel / 0.1, compute_uv=False) / np.sqrt(7 / 5)
            assert 0.65 < values.min() <= values.max() < 1.25
    raw = np.linalg.svd(np.asarray(gradients(0)["layers_0"]["up"]["kernel"]), compute_uv=False)
    assert raw.max() / raw.min() > 2.5  # the gradient itself is far from orthogonal


def test_muon_keeps_the_direction_of_the_gradient():
    gradient = np.asarray(gradients(0)["layers_0"]["up"]["kernel"])
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    found = -muon_without_decay()[0]["layers_0.up.kernel"]
    assert np.sum(found * (u @ v)) / np.linalg.norm(found) / np.linalg.norm(u @ v) > 0.97


def test_a_scanned_stack_is_a_batch_of_matrices():
    stacked = [each["scanned.layers.up.kernel"] for each in muon_without_decay()]
    optimizer = optimizers.muon(0.1, 0.01, weight_decay=0.0, clip_norm=1e9)
    kernels = {
        f"layers_{i}": {"kernel": PARAMS["scanned"]["layers"]["up"]["kernel"][i]} for i in range(3)
    }
    state, update = optimizer.init(kernels), jax.jit(optimizer.update)
    for seed, expected in enumerate(stacked):
        gradient = gradients(seed)["scanned"]["layers"]["up"]["kernel"]
        each = {f"layers_{i}": {"kernel": gradient[i]} for i in range(3)}
        change, state = update(each, state, kernels)
        for i in range(3):
            np.testing.assert_allclose(change[f"layers_{i}"]["kernel"], expected[i], atol=1e-5)


def test_muon_leaves_everything_else_to_adamw():
    alone = optax.adamw(0.01, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    for found, expected in zip(
        muon_without_decay(), updates(alone, gradients(0), gradients(1)), strict=True
    ):
        for name in found.keys() - HIDDEN:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-7)
        for name in HIDDEN:
            assert np.abs(found[name] - expected[name]).max() > 1e-2


def test_the_rate_rises_to_its_peak_and_falls_along_a_cosine_to_its_end():
    schedule = optimizers.warmup_cosine(0.8, 50, warmup=10, final=0.05)
    rates = np.array([schedule(step) for step in range(60)])
    np.testing.assert_allclose(rates[0], 0.08, rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[:11]), 0.072, rtol=1e-5)
    np.testing.assert_allclose(rates[10], 0.8, rtol=1e-6)
    np.testing.assert_allclose(rates[30], 0.8 * (1 + 0.05) / 2, rtol=1e-6)
    np.testing.assert_allclose(rates[50:], 0.04, rtol=1e-5)
    assert (np.diff(rates[10:51]) < 0).all()


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert float(optimizers.warmup_cosine(0.8, 5, warmup=0)(0)) == pytest.approx(0.8)


@pytest.mark.parametrize("warmup", [-1, 5, 6])
def test_a_warm_up_that_leaves_no_steps_is_refused(warmup):
    with pytest.raises(ValueError, match=f"warmup={warmup} does not fit into steps=5"):
        optimizers.warmup_cosine(0.1, 5, warmup=warmup)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (3, 100), (1, 5)])
def test_muon_cosine_is_muon_along_two_cosines(steps, warmup):
    fits = functools.partial(optimizers.warmup_cosine, steps=steps, warmup=min(warmup, steps - 1))
    once = optimizers.muon_cosine(0.02, 0.003, steps, warmup=warmup)
    spelled = optimizers.muon(fits(0.02), fits(0.003))
    grads = jax.tree.map(jnp.cos, PARAMS)
    states = [optimizer.init(PARAMS) for optimizer in (once, spelled)]
    for _ in range(3):
        (one, states[0]), (two, states[1]) = (
            optimizer.update(grads, state, PARAMS)
            for optimizer, state in zip((once, spelled), states)
        )
        jax.tree.map(np.testing.assert_array_equal, one, two)
