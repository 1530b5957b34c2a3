"""Captions of images, and one vocabulary of their words and of the codes of the images."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from experiments.strokes import SLANTS, STROKES, Measure
from jaxformer.ops import augment
from jaxformer.tokenizers import bpe
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.image import ImageTokenizer
from jaxformer.training import images
from jaxformer.typing import Float, Int, Shaped, UInt8

END = 0  # the token that begins, ends and pads a caption; nothing else is in an empty one
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class CaptionError(ValueError):
    """Images cannot be read or have no captions, or a caption is too long."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Images with C = 1 or 3, and as many captions of each.

    Attributes:
        train_images: To learn from.
        train_captions: K of each.
        test_images: Never to be learned from.
        test_captions: K of each.
        labels: Of `train_images`, then of `test_images`, if they are digits; else None.
    """

    train_images: UInt8[np.ndarray, "train height width C"]
    train_captions: list[tuple[str, ...]]
    test_images: UInt8[np.ndarray, "test height width C"]
    test_captions: list[tuple[str, ...]]
    labels: tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]] | None


def load(origin: str, size: int = 0) -> Captioned:
    """Reads images as `training.images.load` does, and says what is to be seen on them.

    A size other than 0 is the height and width that they are brought to.

    Digits are called by name, stroke and slant; other images by the `names` of an npz file, if it
    has some, and by the names of their classes.

    Raises:
        CaptionError: If the images cannot be read, or have no classes.
    """
    try:
        return _load(origin, size or None)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise CaptionError(error) from error


def _load(origin: str, size: int | None) -> Captioned:
    whole = images.load(origin, size=size)
    pixels = whole.train_images, whole.test_images
    labels = whole.train_labels, whole.test_labels
    if whole.label_names == tuple("0123456789") and pixels[0].shape[1:] == (28, 28, 1):
        measure = Measure.of(light(pixels[0])[..., 0], labels[0])
        told = [_digits(light(x)[..., 0], y, measure) for x, y in zip(pixels, labels)]
        return Captioned(pixels[0], told[0], pixels[1], told[1], labels)
    if not whole.label_names:
        raise ValueError(f"{origin}: the images have no classes to be called by.")
    told = [[(_words(whole.label_names[label]),) for label in part] for part in labels]
    if origin.startswith("npz:"):
        pixels, told = _named(origin, size)
    return Captioned(pixels[0], told[0], pixels[1], told[1], None)


def _named(
    origin: str, size: int | None
) -> tuple[tuple[np.ndarray, np.ndarray], list[list[tuple[str, ...]]]]:
    """Divides a file anew, so that the names of its rows are known; a tenth is to test with."""
    whole = images.load(origin, size=size, held_out=0.0)
    with np.load(pathlib.Path(origin.removeprefix("npz:")).expanduser()) as file:
        names = file["names"] if "names" in file else np.full(len(whole.train_labels), "")
    rows = np.random.default_rng(0).permutation(len(names))
    test, train = np.split(rows, [max(1, len(names) // 10)])
    told = []
    for part in (train, test):
        kinds = [_words(whole.label_names[label]) for label in whole.train_labels[part]]
        called = [_words(str(name)) for name in names[part]]
        told.append([(n or k, f"{n}, {k}" if n else k) for n, k in zip(called, kinds)])
    return (whole.train_images[train], whole.train_images[test]), told


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").lower()


def light(pixels: UInt8[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C"]:
    """Bytes as numbers from 0 to 1, as tokenizers of images take them."""
    return pixels.astype(np.float32) / 255


def _digits(
    ink: Float[np.ndarray, "n 28 28"], labels: Int[np.ndarray, " n"], measure: Measure
) -> list[tuple[str, ...]]:
    """All that can be said of each digit, the most of it last."""
    return [
        (
            *plain(label),
            f"a {STROKES[stroke]} {DIGITS[label]}",
            f"a handwritten {DIGITS[label]}, {SLANTS[slant]}",
            attributed(label, stroke, slant),
        )
        for label, stroke, slant in zip(labels, *measure.read(ink, labels))
    ]


def plain(digit: int) -> tuple[str, ...]:
    """Captions that tell no more than the digit."""
    name = DIGITS[digit]
    return f"a{'n' * (name[0] == 'e')} {name}", f"the digit {digit}", f"a handwritten {name}"


def attributed(digit: int, stroke: int, slant: int) -> str:
    """The caption that tells all, by places in `STROKES` and `SLANTS`."""
    return f"a {STROKES[stroke]} {DIGITS[digit]}, {SLANTS[slant]}"


def learn(images: Captioned, vocab_size: int) -> tuple[Bpe, int]:
    """Learns tokens from the captions to train with, and T such that the longest of all fits."""
    learned, others = (
        sorted({caption for several in part for caption in several})
        for part in (images.train_captions, images.test_captions)
    )
    text = bpe.train(learned, vocab_size=vocab_size, special_tokens=["<end>"])
    return text, 1 + max(map(len, text.encode_batch(learned + others)))


def read(text: Bpe, captions: Sequence[str], length: int) -> Int[np.ndarray, "n {length}"]:
    """The tokens of captions, filled up with `END`.

    Raises:
        CaptionError: If one has more than T - 1.
    """
    found = np.full((len(captions), length), END, np.int32)
    for row, caption in zip(found, captions):
        tokens = text.encode(caption)
        if len(tokens) >= length:
            raise CaptionError(
                f"{caption!r} has {len(tokens)} tokens; T={length} leaves room for {length - 1}, "
                "as many as the longest caption of the images has."
            )
        row[: len(tokens)] = tokens
    return found


@dataclasses.dataclass(frozen=True)
class Joint:
    """One vocabulary: tokens of text, and behind them the codes of an image.

    Attributes:
        text: Whose token `END` is no text.
        image: Of the codes.
        length: T, tokens of a caption and at least one `END`.
    """

    text: Bpe
    image: ImageTokenizer
    length: int

    @property
    def vocab_size(self) -> int:
        """V, of both."""
        return self.text.vocab_size + self.image.vocab_size

    @property
    def codes(self) -> int:
        """P, codes of an image."""
        return math.prod(self.image.grid)

    def read(self, captions: Sequence[str]) -> Int[np.ndarray, "n {self.length}"]:
        """The tokens of captions; see `read`."""
        return read(self.text, captions, self.length)

    def look(self, pixels: Shaped[np.ndarray, "n height width C"]) -> Int[np.ndarray, "n P"]:
        """The tokens of images of bytes."""
        return self.image.encode(light(pixels)) + self.text.vocab_size

    def look_moved(
        self, pixels: UInt8[np.ndarray, "n height width C"], copies: int, shift: int, seed: int
    ) -> Int[np.ndarray, "n M P"]:
        """The tokens of images, and of copies moved by up to `shift` pixels, edges drawn out."""
        move = jax.jit(functools.partial(augment.random_crop, padding=shift, mode="edge"))
        keys, ink = jax.random.split(jax.random.key(seed), copies), light(pixels)
        several = (ink, *(np.asarray(move(key, ink)) for key in keys))
        codes = np.stack([self.image.encode(x) for x in several], axis=1)
        return codes + self.text.vocab_size

    def draw(self, tokens: Int[np.ndarray, "n P"]) -> Float[np.ndarray, "n height width C"]:
        """The images of tokens, from 0 to 1."""
        return self.image.decode(np.asarray(tokens) - self.text.vocab_size)
