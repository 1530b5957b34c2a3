"""Pixels as models read them, many images in turn, and what is read from features."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import vision, vit
from jaxformer.models.vit import ViT, ViTConfig
from jaxformer.training.images import Images

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.integers(0, 256, (7, 6, 4, 3)).astype(np.uint8), np.arange(7) % 2
SEEN = Images(X, Y, X[:5], Y[:5], ("even", "odd"), "here")
CONFIG = ViTConfig((4, 4), (2, 2), 1, 8, 1, 2, 8, pool="both")


@dataclasses.dataclass(frozen=True)
class Settings:
    run: str = "a"
    steps: int = 3


def test_a_checkpoint_depends_on_images_and_labels_but_not_on_where_they_lie():
    cfg = vit.Config()
    one = vision.meaning(cfg, SEEN)
    assert one == vision.meaning(dataclasses.replace(cfg, run="x", data="y"), SEEN)
    others = {"train_labels": 1 - SEEN.train_labels, "label_names": ("a", "b", "c")}
    others["train_images"] = 255 - SEEN.train_images
    for name, value in others.items():
        assert vision.meaning(cfg, dataclasses.replace(SEEN, **{name: value})) != one


def test_bytes_become_numbers_from_minus_one_to_one():
    pixels = jnp.array([0, 51, 255], jnp.uint8)[:, None, None]
    np.testing.assert_allclose(vision.light(pixels).ravel(), [0, 0.2, 1])
    np.testing.assert_allclose(vision.centred(vision.light(pixels)).ravel(), [-1, -0.6, 1], 1e-6)


@pytest.mark.parametrize("batch", [3, 7, 11])
def test_a_reader_gives_a_row_an_image_whatever_the_batch(batch):
    read = vision.reader(lambda params, x: {"sum": params * x.sum(axis=(1, 2, 3))}, batch)
    want = 2 * (X / 127.5 - 1).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(read(2.0, X)["sum"], want, atol=1e-3)


def test_a_model_takes_the_size_of_the_images_and_its_encoder_is_read(draw):
    config = vision.settled(CONFIG, SEEN)
    assert (config.size, config.channels) == ((6, 4), 3)
    x = vision.centred(vision.light(jnp.asarray(X)))
    variables = draw(ViT(config), x)
    found = vision.pooled(config)({"params": {"encoder": variables["params"], "other": 1}}, X)
    np.testing.assert_allclose(found, ViT(config).apply(variables, x, method="pooled"), atol=1e-5)
    with pytest.raises(ValueError, match="do not divide an image of 6×4"):
        vision.settled(dataclasses.replace(CONFIG, patch=(4, 4)), SEEN)


def test_what_a_checkpoint_depends_on_is_settings_and_images_but_not_where_a_run_lies():
    first = vision.meaning(Settings(), SEEN)
    assert first == vision.meaning(Settings(run="b"), SEEN)
    assert first != vision.meaning(Settings(steps=4), SEEN)
    assert first != vision.meaning(Settings(), dataclasses.replace(SEEN, train_images=X[::-1]))


def test_classes_are_read_from_features_that_tell_them_and_not_without_names():
    bank, queries = (np.stack([y, 1 - y], 1) + 0.1 * RANDOM.random((len(y), 2)) for y in (Y, Y[:5]))
    assert vision.judge(SEEN, bank, queries) == {"linear probe %": 100, "7 neighbours %": 100}
    assert vision.judge(SEEN, bank, 1 - queries)["linear probe %"] == 0
    nameless = dataclasses.replace(SEEN, label_names=())
    assert vision.judge(nameless, bank, queries) == {}
    found = vision.judge_pixels(SEEN)
    assert list(found) == ["pixels, linear probe %", "pixels, 7 neighbours %"]
    assert vision.judge_pixels(nameless) == {}
    pixels = [x.reshape(len(x), -1) / 255 for x in (SEEN.train_images, SEEN.test_images)]
    assert [*found.values()] == [*vision.judge(SEEN, *map(np.float32, pixels)).values()]
