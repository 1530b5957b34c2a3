"""What a trained model of digits knows and writes: the second half of `experiments/ar_mnist.py`.

Every figure is computed here, from the parameters and the test digits alone.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import digit_reader
from jaxformer.generation import decode, samplers
from jaxformer.models import image_gpt
from jaxformer.models.image_gpt import ImageGPT
from jaxformer.ops import losses
from jaxformer.training import mnist, pictures, records
from jaxformer.training.step import place
from jaxformer.typing import Array, Float, Int, PyTree, UInt8

_BATCH = 200
Ink = Literal["threshold", "dynamic"]


def evaluate(
    reader: ImageGPT,
    writer: ImageGPT,
    params: PyTree,
    digits: mnist.Digits,
    ink: Ink,
    seed: int,
    devices: Mesh,
) -> tuple[dict[str, Any], UInt8[np.ndarray, "n 28 28"]]:
    """Computes every figure of the report, and writes 1,000 new digits: ten of a class, in turn.

    Args:
        reader: The model in its form for whole sequences.
        writer: The model in a form that takes a cache.
        params: Of both.
        digits: The test digits are what is evaluated; the training digits train the judge.
        ink: The binarisation, which is named beside the figures.
        seed: Of the new digits.
        devices: Every process computes the same on its own ones of these.
    """
    devices = devices.local_mesh
    params = jax.device_put(jax.device_get(params), jax.NamedSharding(devices, jax.P()))
    images = test_images(digits, ink)
    scores = class_log_likelihoods(reader, params, images, devices)
    prior = np.bincount(digits.train_labels, minlength=10) / len(digits.train_labels)
    new, classes, speeds = written(reader, writer, params, 1000, seed, devices)
    figures = {"binarisation": ink, "test_digits": len(images)}
    figures |= knowledge(scores, digits.test_labels, prior)
    figures |= {"new_digits": len(new)} | speeds | judged(digits, ink, new, classes)
    return figures, new


def show(folder: pathlib.Path, new: UInt8[np.ndarray, "n 28 28"]) -> None:
    """Draws `samples.png` and `loss.png` into the folder of a run, and prints its report."""
    pictures.digit_grid(
        new[:100].reshape(10, 10, *new.shape[1:]), folder / "samples.png", row_labels="0123456789"
    )
    rows = records.read_metrics(folder / "metrics.jsonl")
    pictures.loss_curve(rows, folder / "loss.png")
    print(records.table(json.loads((folder / "report.json").read_text())))
    print(f"pictures and report: {folder}")


def class_log_likelihoods(
    model: ImageGPT, params: PyTree, images: UInt8[np.ndarray, "n 28 28"], devices: Mesh
) -> Float[np.ndarray, "n classes"]:
    """Computes `log p(image | class)` in nats for every class, one pass each."""

    @jax.jit
    def score(params: PyTree, images: Array, classes: Array) -> Array:
        cells = image_gpt.to_tokens(images.astype(jnp.int32), model.config)
        logits: Any = model.apply(params, image_gpt.with_class(classes, cells, model.config))
        return -losses.cross_entropy(logits, cells).sum(-1)

    batch = _BATCH * devices.shape["data"]
    columns = []
    for label in range(model.config.num_classes):
        classes = place(np.full(batch, label, np.int32), devices)
        rows = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.pad(part, [(0, batch - len(part)), (0, 0), (0, 0)])
            rows.append(score(params, place(padded, devices), classes)[: len(part)])
        columns.append(np.concatenate(jax.device_get(rows)))
    return np.stack(columns, axis=1)


def knowledge(
    scores: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    prior: Float[np.ndarray, " classes"],
) -> dict[str, float]:
    """Nats per image given the class, nats over all classes, and accuracy of `argmax p(c | x)`."""
    joint = scores + np.log(prior)[None]
    best = joint.max(axis=1, keepdims=True)
    total = best[:, 0] + np.log(np.exp(joint - best).sum(axis=1))
    return {
        "nats_conditional": float(-scores[np.arange(len(labels)), labels].mean()),
        "nats_unconditional": float(-total.mean()),
        "classifier_accuracy": float((joint.argmax(axis=1) == labels).mean()),
    }


def make_writer(model: ImageGPT) -> Callable[..., Array]:
    """Compiles a function of parameters, classes and key that writes cells with a cache."""
    steps, sample = model.config.cells, samplers.sampler()

    @jax.jit
    def write(params: PyTree, classes: Array, key: Array) -> Array:
        def step(tokens: Array, cache: Any) -> tuple[Array, Any]:
            return model.apply(params, tokens, cache)

        start = (classes + model.config.vocab_size)[:, None]
        cache = model.empty_cache(len(classes))
        return decode.generate(step, cache, start, steps=steps, sample=sample, key=key)[:, 1:]

    return write


def make_slow_writer(model: ImageGPT) -> Callable[..., Array]:
    """The same without a cache, for the first `count` cells: the whole sequence again for each."""
    sample = samplers.sampler()

    @jax.jit
    def one(params: PyTree, tokens: Array, position: Array, key: Array) -> Array:
        logits = model.apply(params, tokens[:, :-1])
        here = jax.lax.dynamic_index_in_dim(logits, position, axis=1, keepdims=False)
        new = sample(jax.random.fold_in(key, position + 1), here).astype(tokens.dtype)
        return jax.lax.dynamic_update_slice(tokens, new[:, None], (0, position + 1))

    def write(params: PyTree, classes: Array, key: Array, count: int) -> Array:
        start = (classes + model.config.vocab_size)[:, None]
        tokens = jnp.pad(start, ((0, 0), (0, model.config.cells)))
        for position in range(count):
            tokens = one(params, tokens, jnp.int32(position), key)
        return tokens[:, 1:]

    return write


def written(
    reader: ImageGPT, writer: ImageGPT, params: PyTree, count: int, seed: int, devices: Mesh
) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"], dict[str, float]]:
    """Writes `count` digits, as many of each class, and times it with the cache and without.

    Args:
        reader: The model in its form for whole sequences, for writing without a cache.
        writer: The model in a form that takes a cache.
        params: Of both.
        count: A multiple of 100, which is the batch.
        seed: Of the draws.
        devices: A batch is split over them if they divide it.

    Returns:
        Images, their classes, and the speeds; the one without a cache is that of a seventh of the
        cells, which all cost the same.
    """
    batch = np.repeat(np.arange(10, dtype=np.int32), 10)
    classes = place(batch, devices) if len(batch) % devices.shape["data"] == 0 else batch
    fast, slow = make_writer(writer), make_slow_writer(reader)
    keys = jax.random.split(jax.random.key(seed), count // len(batch))
    jax.block_until_ready((fast(params, classes, keys[0]), slow(params, classes, keys[0], 1)))
    cells, fast_time = _timed(lambda: [fast(params, classes, key) for key in keys])
    part = writer.config.cells // 7  # every cell takes as long as any other
    _, slow_time = _timed(lambda: slow(params, classes, keys[0], part))

    draw = jax.jit(functools.partial(image_gpt.to_images, config=writer.config))
    images = draw(jnp.concatenate(cells))
    fast_rate = count / fast_time
    slow_rate = len(batch) / slow_time * part / writer.config.cells
    speeds = {
        "images_per_second_with_cache": fast_rate,
        "images_per_second_without_cache": slow_rate,
        "cache_speedup": fast_rate / slow_rate,
    }
    return np.asarray(images).astype(np.uint8), np.tile(batch, len(keys)), speeds


def judged(
    digits: mnist.Digits,
    ink: Ink,
    images: UInt8[np.ndarray, "n 28 28"],
    classes: Int[np.ndarray, " n"],
) -> dict[str, float]:
    """Trains an independent reader and asks it what the new digits are."""
    params = digit_reader.train_reader(digits.train_images, digits.train_labels, ink=ink)
    test = test_images(digits, ink)
    real = np.argmax(digit_reader.read(params, test), axis=1)
    new = np.argmax(digit_reader.read(params, images), axis=1)
    return {
        "reader_accuracy_on_test_digits": float((real == digits.test_labels).mean()),
        "new_digits_read_as_asked": float((new == classes).mean()),
    }


def test_images(digits: mnist.Digits, ink: Ink) -> UInt8[np.ndarray, "n 28 28"]:
    """The test digits in black and white; where that is drawn, always drawn the same."""
    if ink == "threshold":
        return mnist.threshold(digits.test_images)
    return mnist.dynamic(digits.test_images, np.random.default_rng(0))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(work())
    return result, time.perf_counter() - began
