"""Captions say what is to be seen, and share one vocabulary with the codes of images."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import captions
from experiments.captions import END, Captioned, CaptionError, Joint
from jaxformer.tokenizers.image import ImageTokenizer


@dataclasses.dataclass(frozen=True)
class Brightness(ImageTokenizer):
    """The brightness of each pixel, of five."""

    vocab_size = 5
    size = (2, 3, 1)
    grid = (2, 3)

    def _encode(self, images):
        return np.round(4 * images.reshape(-1, 6)).astype(np.int32)

    def _decode(self, ids):
        return ids.reshape(-1, 2, 3, 1) / np.float32(4)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A file of images with names of their own."""
    path = tmp_path_factory.mktemp("images") / "emoji.npz"
    names = np.array([f"sign_{n}-up" for n in range(40)])
    x = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    np.savez(path, x=x, y=np.arange(40) % 2, names=names, label_names=["Cats & Dogs", "Food"])
    return f"npz:{path}"


def test_captions_of_digits_tell_digit_stroke_and_slant():
    images = captions.load("embedded")
    assert len(images.train_captions) == len(images.train_images) == 10_000
    label = images.labels[1][3]
    told = images.test_captions[3]
    assert told[:3] == captions.plain(label)
    assert all(captions.DIGITS[label] in text or str(label) in text for text in told)
    found = {captions.attributed(label, width, turn) for width in range(3) for turn in range(3)}
    assert told[-1] in found
    assert captions.plain(8)[0] == "an eight"


def test_a_file_calls_its_images_by_name_and_class_and_sets_a_tenth_aside(emoji):
    images = captions.load(emoji)
    assert images.labels is None
    assert [len(images.train_images), len(images.test_images)] == [36, 4]
    for pixels, told in (
        (images.train_images, images.train_captions),
        (images.test_images, images.test_captions),
    ):
        for image, (name, whole) in zip(pixels, told, strict=True):
            number = int(image[0, 0, 0])
            assert name == f"sign {number} up"
            assert whole == f"{name}, {('cats & dogs', 'food')[number % 2]}"


def test_what_cannot_be_read_or_called_is_refused(tmp_path):
    with pytest.raises(CaptionError, match="no such file"):
        captions.load(f"npz:{tmp_path / 'none.npz'}")


@pytest.fixture(scope="module")
def joint():
    pixels = np.zeros((3, 2, 3, 1), np.uint8)
    train, test = [("a cat", "cats"), ("a dog", "dogs")], [("a catalogue", "a")]
    images = Captioned(pixels[:2], train, pixels[2:], test, None)
    text, length = captions.learn(images, 270)
    return Joint(text, Brightness(), length)


def test_captions_end_and_are_padded_and_the_longest_of_all_fits(joint):
    found = joint.read(["a catalogue", "cats", ""])
    assert found.shape == (3, joint.length)
    assert (found[:2] != END).sum(axis=1).max() == joint.length - 1
    assert (found[:, -1] == END).all()
    assert (found[2] == END).all()
    assert joint.text.decode(found[1][found[1] != END].tolist()) == "cats"
    with pytest.raises(CaptionError, match=f"T={joint.length} leaves room for {joint.length - 1}"):
        joint.read(["a catalogue of dogs and all that"])


def test_codes_lie_behind_the_text_and_are_drawn_again(joint):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1) * 20
    tokens = joint.look(pixels)
    assert tokens.min() >= joint.text.vocab_size
    assert tokens.max() < joint.vocab_size == joint.text.vocab_size + 5
    assert joint.codes == math.prod(Brightness.grid)
    np.testing.assert_allclose(joint.draw(tokens), pixels / 255, atol=1 / 8)
