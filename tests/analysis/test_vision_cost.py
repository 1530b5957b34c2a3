"""The formulas count what a ViT has and what JAX's programs multiply and keep."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxformer.analysis import vision_cost
from jaxformer.models import published_vision
from jaxformer.models.vit import ViT, ViTConfig

B, SIZE = 5, (6, 21)  # 2 × 3 patches of 3 × 7
PLAIN = ViTConfig(SIZE, (3, 7), 2, 24, num_layers=3, num_heads=2, hidden=17, num_classes=13)
CONFIGS = {
    "vit": dataclasses.replace(PLAIN, pooler=True),
    "dino": dataclasses.replace(
        PLAIN,
        registers=4,
        mask_token=True,
        layer_scale=1.0,
        gated=True,
        class_position=False,
        pool="both",
        scan=True,
    ),
    "dino, mapped": dataclasses.replace(PLAIN, positions="rotary", pool="both", pooler=True),
    "keyless": dataclasses.replace(PLAIN, key_bias=False, remat=True),
    "jepa": dataclasses.replace(
        PLAIN, positions="sinusoidal", class_token=False, pool="mean", num_classes=0
    ),
    "biasless": dataclasses.replace(PLAIN, qkv_bias=False, positions="none"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
IMAGES, LARGER = jnp.zeros((B, *SIZE, 2)), jnp.zeros((B, 9, 28, 2))


def told(config):
    return "logits" if config.num_classes else "pooled"


def shapes(config):
    init = functools.partial(ViT(config).init, method=told(config))
    return jax.eval_shape(init, jax.random.key(0), IMAGES)


def apply(config):
    return functools.partial(ViT(config).apply, method=told(config))


@every_config
def test_parameters_are_those_of_the_tree_part_by_part(name, size):
    config, found = CONFIGS[name], vision_cost.parameters(CONFIGS[name])
    tree = shapes(config)["params"]
    assert found.total == size(tree)
    assert found.head == size([tree.get("head", {}), tree.get("pool", {})])
    outer = ("embed", "class_token", "registers", "mask_token", "places")
    assert found.embedding == size([tree.get(part, {}) for part in outer])


@every_config
def test_operations_are_those_of_the_products(name, multiplied):
    config, tree = CONFIGS[name], shapes(CONFIGS[name])
    forward = vision_cost.forward(config, B).total
    assert forward == multiplied(apply(config), tree, IMAGES)
    slope = jax.grad(lambda tree: jnp.square(apply(config)(tree, IMAGES)).sum())
    assert forward + vision_cost.backward(config, B).total == multiplied(slope, tree)


@pytest.mark.parametrize("name", ["dino, mapped", "keyless", "biasless"])
def test_larger_images_and_few_patches_multiply_what_is_counted(name, multiplied):
    config = dataclasses.replace(CONFIGS[name], positions="rotary")
    tree = shapes(config)
    larger = vision_cost.forward(config, B, size=(9, 28)).total
    assert larger == multiplied(apply(config), tree, LARGER)
    keep = functools.partial(apply(config), keep=jnp.zeros((B, 4), int))
    assert vision_cost.forward(config, B, seen=4).total == multiplied(keep, tree, IMAGES)
    assert vision_cost.tokens(config, (9, 28)) == 3 * 4 + config.prefix
    with pytest.raises(ValueError, match="28"):
        vision_cost.tokens(config, (28, 28))


# Of an image what is no factor of a product: the logits, and what enters activations, learned
# scales and tanh
BESIDES = {
    "vit": 7 * 3 * 17 + 13,
    "dino": (6 + 5) * 3 * 2 * 17 + 13,
    "biasless": 7 * 3 * 17 + 13,
    "jepa": 6 * 3 * 17,
}


@pytest.mark.parametrize("name", BESIDES)
def test_activations_hold_both_factors_of_every_product(name, factors):
    config = CONFIGS[name]
    leaves, treedef = jax.tree.flatten(shapes(config))

    def of_leaves(leaves, images):
        return apply(config)(treedef.unflatten(leaves), images)

    found = vision_cost.activation_bytes(config, B)
    counted = factors(of_leaves, leaves, IMAGES) + B * BESIDES[name]
    assert found.total - found.norms == 4 * counted
    few = vision_cost.activation_bytes(config, B, seen=6, dtype="bfloat16")
    assert 2 * few.total == found.total


def test_a_quarter_of_the_patches_costs_about_a_quarter():
    config = published_vision.AUTOENCODERS["mae_l16"].encoder
    part, whole = (vision_cost.forward(config, seen=n).total for n in (49, 196))
    assert 49 / 196 - 0.01 < part / whole < 50 / 197  # the class token is seen in both


def test_published_operations():
    """Twice the multiplications that the documentation of torchvision lists for its models."""
    for name, billions in {"vit_b16": 17.56, "vit_l16": 61.55}.items():
        found = vision_cost.forward(published_vision.ENCODERS[name]).total
        assert found / 2e9 == pytest.approx(billions, rel=1e-3)


def test_the_formulas_load_no_jax():
    code = "import sys, jaxformer.analysis.vision_cost; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
