"""Vision Transformers: what they see, in which order, and what a config may ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.encoder import attention_maps
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.ops import patches
from jaxformer.ops.attention import key_lengths
from jaxformer.ops.rope import GridRope

CONFIG = ViTConfig((6, 10), (3, 2), 3, width=8, num_layers=2, num_heads=2, hidden=11, num_classes=7)
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 6, 10, 3)), jnp.float32)
CHANGES = {
    "size": (9, 10),
    "patch": (3, 5),
    "channels": 1,
    "width": 12,
    "num_layers": 1,
    "num_heads": 4,
    "hidden": 5,
    "class_token": False,
    "registers": 3,
    "mask_token": True,
    "positions": "none",
    "class_position": False,
    "antialias": True,
    "rope": GridRope(50.0),
    "activation": "relu",
    "gated": True,
    "qkv_bias": False,
    "key_bias": False,
    "epsilon": 1e-3,
    "layer_scale": 0.1,
    "dropout": 0.1,
    "drop_path": 0.1,
    "pool": "both",
    "pooler": True,
    "num_classes": 5,
    "scan": True,
    "remat": True,
}
# What must be chosen too for a field to matter.
WITH = {
    "class_token": {"pool": "mean"},
}


FIELDS = dataclasses.fields(ViTConfig)


def bare(config=CONFIG, **changes):
    return dataclasses.replace(config, num_classes=0, **changes)


def images_of(config):
    return jnp.ones((2, 6, 10, config.channels)) * IMAGES[..., : config.channels]


@pytest.fixture(scope="module")
def variables(draw):
    return draw(ViT(CONFIG), IMAGES, method="logits")


@pytest.mark.parametrize("field", sorted({f.name for f in FIELDS} - {"rope", "antialias"}))
def test_every_field_is_read(program, field):
    plain = dataclasses.replace(CONFIG, **WITH.get(field, {}))
    changed = dataclasses.replace(plain, **{field: CHANGES[field]})
    one, other = (program(ViT(x), images_of(x), method="logits") for x in (plain, changed))
    assert one != other


@pytest.mark.parametrize(
    ("field", "more"),
    [("rope", {"positions": "rotary", "num_heads": 1}), ("antialias", {"size": (12, 20)})],
)
def test_every_field_of_positions_is_read(draw, field, more):
    plain = bare(**more)
    variables = draw(ViT(plain), IMAGES)
    changed = dataclasses.replace(plain, **{field: CHANGES[field]})
    one, other = (ViT(x).apply(variables, IMAGES) for x in (plain, changed))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "rotary", "registers": 2}, {"positions": "sinusoidal"}],
    ids=str,
)
def test_without_positions_patches_are_a_set_and_with_them_an_image(draw, changes):
    config = bare(**changes)
    order = jnp.asarray(np.random.default_rng(0).permutation(10))
    shuffled = patches.unpatchify(
        patches.patchify(IMAGES, config.patch)[:, order], config.patch, config.size
    )
    for positions, moves in ((config.positions, True), ("none", False)):
        model = ViT(dataclasses.replace(config, positions=positions))
        variables, apply = draw(model, IMAGES), jax.jit(model.apply)
        one, other = apply(variables, IMAGES), apply(variables, shuffled)
        first = config.prefix
        assert (np.abs(one[:, first:][:, order] - other[:, first:]).max() > 0.01) == moves
        assert (np.abs(one[:, 0] - other[:, 0]).max() > 0.01) == moves


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_keeping_all_patches_in_any_order_changes_nothing_but_their_order(draw, positions):
    model = ViT(bare(positions=positions, registers=1))
    variables = draw(model, IMAGES)
    order = jnp.asarray(np.stack([np.random.default_rng(n).permutation(10) for n in range(2)]))
    whole = jax.jit(model.apply)(variables, IMAGES)
    kept = jax.jit(lambda v, k: model.apply(v, IMAGES, keep=k))(variables, order)
    assert kept.shape == whole.shape == (2, 12, 8)
    np.testing.assert_allclose(kept[:, :2], whole[:, :2], atol=1e-5)
    expected = np.take_along_axis(np.asarray(whole[:, 2:]), np.asarray(order)[..., None], axis=1)
    np.testing.assert_allclose(kept[:, 2:], expected, atol=1e-5)


def test_what_is_not_kept_has_no_influence(draw):
    model, keep = ViT(bare()), jnp.asarray([[7, 2, 3], [0, 9, 4]])
    variables = draw(model, IMAGES)
    seen = jax.jit(jax.grad(lambda x: jnp.sin(model.apply(variables, x, keep=keep)[:, 0]).sum()))(
        IMAGES
    )
    touched = np.abs(patches.patchify(seen, CONFIG.patch)).max(axis=-1) > 0
    assert [set(np.flatnonzero(row)) for row in touched] == [{7, 2, 3}, {0, 9, 4}]


def test_a_hidden_patch_is_the_mask_token_wherever_it_was_kept_from(draw):
    model = ViT(bare(mask_token=True))
    variables = draw(model, IMAGES)
    hidden = jnp.zeros((2, 10), bool).at[:, jnp.array([1, 8])].set(True)
    cut = patches.patchify(IMAGES, CONFIG.patch)
    other = patches.unpatchify(jnp.where(hidden[..., None], 9.0, cut), CONFIG.patch, CONFIG.size)
    apply = jax.jit(model.apply)
    found = apply(variables, IMAGES, hidden=hidden)
    np.testing.assert_array_equal(apply(variables, other, hidden=hidden), found)
    assert np.abs(found - apply(variables, IMAGES, hidden=~hidden)).max() > 0.1
    order = jnp.asarray(np.random.default_rng(3).permutation(10))[None].repeat(2, axis=0)
    kept = apply(variables, IMAGES, hidden=hidden, keep=order)[:, 1:]
    np.testing.assert_allclose(kept, found[:, 1:][:, order[0]], atol=1e-5)
    with pytest.raises(ValueError, match="no mask token"):
        ViT(bare()).apply(variables, IMAGES, hidden=hidden)


def test_padding_that_may_not_be_seen_changes_nothing(draw):
    model, keep = ViT(bare(registers=1)), jnp.asarray([[7, 2, 3, 10], [0, 9, 4, 99]])
    variables = draw(model, IMAGES)
    apply = jax.jit(model.apply)
    short = apply(variables, IMAGES, keep=keep[:, :3])
    long = apply(variables, IMAGES, key_lengths(jnp.array([5, 5])), keep=keep)
    np.testing.assert_allclose(long[:, :5], short, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_images_of_another_size_are_read(draw, positions):
    model = ViT(bare(positions=positions))
    variables = draw(model, IMAGES)
    large = jnp.concatenate([IMAGES, IMAGES[:, ::-1]], axis=1)
    found = jax.jit(model.apply)(variables, large)
    assert found.shape == (2, 1 + 20, 8)
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match=r"3×2 do not divide an image of 6×9"):
        model.apply(variables, IMAGES[:, :, :9])
    with pytest.raises(ValueError, match="C=1 channels, expected 3"):
        model.apply(variables, IMAGES[..., :1])


def test_clips_are_read(draw):
    config = ViTConfig((4, 6, 10), (2, 3, 5), 1, 12, 1, 2, 5, class_token=False, pool="mean")
    config = dataclasses.replace(config, positions="rotary", rope=GridRope(1e4, 1.0, True))
    clip = jnp.asarray(np.random.default_rng(0).random((1, 4, 6, 10, 1)), jnp.float32)
    model = ViT(config)
    variables = draw(model, clip, method="pooled")
    found, back = (jax.jit(model.apply)(variables, x) for x in (clip, clip[:, ::-1]))
    assert found.shape == (1, 8, 12)
    assert np.abs(found - back).max() > 0.01


def test_an_image_is_its_token_its_mean_patch_or_both(draw):
    config = bare(registers=2)
    variables = draw(ViT(config), IMAGES)
    x = ViT(config).apply(variables, IMAGES)
    found = {
        pool: ViT(bare(registers=2, pool=pool)).apply(variables, IMAGES, method="pooled")
        for pool in ("token", "mean", "both")
    }
    np.testing.assert_array_equal(found["token"], x[:, 0])
    np.testing.assert_allclose(found["mean"], x[:, 3:].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(
        found["both"], jnp.concatenate([found["token"], found["mean"]], axis=1)
    )


def test_padding_of_the_kept_does_not_enter_the_mean(draw):
    model = ViT(bare(pool="mean"))
    variables, keep = draw(model, IMAGES), jnp.array([[7, 2, 3], [0, 9, 4]])
    short = model.apply(variables, IMAGES, keep=keep, method="pooled")
    long = jnp.concatenate([keep, jnp.full((2, 2), 10)], axis=1)
    may = key_lengths(jnp.array([4, 4]))
    padded = model.apply(variables, IMAGES, may, keep=long, method="pooled")
    np.testing.assert_allclose(padded, short, atol=1e-5)


def test_the_pooler_and_the_head_follow(draw, variables):
    params, features = variables["params"], ViT(CONFIG).apply(variables, IMAGES, method="pooled")
    logits = ViT(CONFIG).apply(variables, IMAGES, method="logits")
    expected = features @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    model = ViT(bare(pooler=True))
    pool = draw(model, IMAGES, method="pooled")["params"]["pool"]
    found = model.apply({"params": params | {"pool": pool}}, IMAGES, method="pooled")
    np.testing.assert_allclose(
        found, jnp.tanh(features @ pool["kernel"] + pool["bias"][None]), atol=1e-5
    )
    with pytest.raises(ValueError, match="num_classes=0"):
        ViT(bare()).apply(variables, IMAGES, method="logits")


def test_attention_can_be_drawn_over_the_patches(variables):
    maps = attention_maps(ViT(CONFIG), variables, IMAGES)
    assert maps.shape == (2, 2, 2, 11, 11)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch": (4, 2)}, "4×2 do not divide an image of 6×10"),
        ({"num_heads": 3}, "D=8 is not a multiple of N=3"),
        ({"positions": "alibi"}, "positions must be one of"),
        ({"pool": "max"}, "pool must be one of"),
        ({"class_token": False}, "pool='token' needs a class token"),
        ({"channels": 0}, "C must be positive"),
        ({"activation": "tan"}, "activation must be one of"),
    ],
    ids=str,
)
def test_nonsense_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(CONFIG, **changes)


def test_published_sizes_are_by_name():
    base = ViTConfig.of_size("B/16", num_classes=1000)
    shapes = jax.eval_shape(
        lambda: ViT(base).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), method="logits")
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 86_567_656
    with pytest.raises(ValueError, match="no ViT 'XL/16'"):
        ViTConfig.of_size("XL/16")
