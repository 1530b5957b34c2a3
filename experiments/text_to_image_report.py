"""What a model of captions and images knows and draws: the second half of `text_to_image.py`."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from experiments import captions, digit_reader
from experiments.captions import END, Captioned, Joint
from experiments.strokes import Measure
from jaxformer.generation import decode, guidance, samplers
from jaxformer.models.decoder import Decoder
from jaxformer.ops import losses
from jaxformer.tokenizers.image import ImageTokenizer
from jaxformer.training import pictures, records, run
from jaxformer.training.step import place
from jaxformer.typing import Array, Int, PyTree

if TYPE_CHECKING:
    from experiments.text_to_image import Config

_ROWS = 100  # of each device at once
Score = Callable[[PyTree, np.ndarray, np.ndarray], float]
Draw = Callable[[Sequence[str], float], np.ndarray]


def sequence(texts: Int[Array, "B T"], codes: Int[Array, "B P"]) -> Int[Array, "B L"]:
    """What the model reads: `END`, the caption, the image."""
    return jnp.concatenate([jnp.pad(texts, ((0, 0), (1, 0)), constant_values=END), codes], axis=1)


def make_scorer(model: Decoder, joint: Joint, devices: Mesh) -> Score:
    """Makes a function of parameters, captions and codes: mean nats of a code after its caption."""

    @jax.jit
    def score(params: PyTree, texts: Array, codes: Array) -> Array:
        known = sequence(texts, codes)
        logits: Any = model.apply(params, known[:, :-1])
        return losses.cross_entropy(logits[:, joint.length :], codes).sum(axis=-1)

    def mean(params: PyTree, texts: np.ndarray, codes: np.ndarray) -> float:
        rows, nats = _ROWS * devices.shape["data"], []
        for at in range(0, len(codes), rows):
            parts = (x[at : at + rows] for x in (texts, codes))
            some = place([np.pad(x, ((0, rows - len(x)), (0, 0))) for x in parts], devices)
            nats.append(jax.device_get(score(params, *some)))
        return float(np.concatenate(nats)[: len(codes)].mean() / joint.codes)

    return mean


def make_drawer(model: Decoder, params: PyTree, joint: Joint, seed: int, devices: Mesh) -> Draw:
    """Makes a function of captions and a scale of guidance, which draws an image for each.

    The same captions are drawn from the same random numbers at every scale.
    """
    is_code = np.arange(joint.vocab_size) >= joint.text.vocab_size

    @jax.jit
    def write(params: PyTree, texts: Array, scale: Array, key: Array) -> Array:
        told = jnp.pad(texts, ((0, 0), (1, 0)), constant_values=END)
        both = jnp.concatenate([told, jnp.full_like(told, END)])
        plain = Partial(model.apply, params)
        cache = model.empty_cache(len(both), joint.length + joint.codes)
        branches = guidance.branch(plain, cache, both[:, :-1])
        steered = guidance.restricted(guidance.guided(plain, scale), jnp.asarray(is_code))
        options = {"steps": joint.codes, "sample": samplers.sampler(), "key": key}
        return decode.generate(steered, branches, told[:, -1:], **options)[:, 1:]

    def draw(asked: Sequence[str], scale: float) -> np.ndarray:
        rows, written, texts = _ROWS * devices.shape["data"], [], joint.read(asked)
        for at in range(0, len(texts), rows):
            part = texts[at : at + rows]
            some = place(np.pad(part, ((0, rows - len(part)), (0, 0))), devices)
            key = jax.random.fold_in(jax.random.key(seed), at)
            written.append(jax.device_get(write(params, some, jnp.float32(scale), key)))
        return joint.draw(np.concatenate(written)[: len(texts)])

    return draw


def write(
    record: run.Run,
    cfg: "Config",
    model: Decoder,
    params: PyTree,
    images: Captioned,
    joint: Joint,
    devices: Mesh,
) -> None:
    """Writes report and pictures of a model in its fastest form, and prints the report.

    `samples.png` has a row for each caption asked for, `guidance.png` one for each scale,
    `codes.png` images beside their reconstructions, and `loss.png` the nats of a code.
    """
    params = jax.device_put(params, jax.NamedSharding(devices, jax.P()))
    score = make_scorer(model, joint, devices)
    draw = make_drawer(Decoder(model.config), params, joint, cfg.seed, devices)
    ink = captions.light(images.test_images)
    report = {"data": cfg.data, "steps": cfg.steps, "text_tokens": joint.length}
    report |= {"codes_per_image": joint.codes, "vocabulary": joint.vocab_size}
    report |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    report |= {"distortion": joint.image.distortion(ink)}
    report |= knowledge(functools.partial(score, params), images, joint, cfg.seed)
    if images.labels is not None:
        report |= judged(cfg, draw, images, images.labels, joint.image)
    record.report(report)
    show(record, cfg, draw, images, joint)
    print(records.table(report), f"report and pictures: {record.folder}", sep="\n")


def knowledge(
    score: Callable[[np.ndarray, np.ndarray], float], images: Captioned, joint: Joint, seed: int
) -> dict[str, float]:
    """Nats per code of held-out images after their captions, those of others, and none."""
    texts, codes = joint.read([c[-1] for c in images.test_captions]), joint.look(images.test_images)
    order = np.random.default_rng(seed).permutation(len(texts))
    return {
        "nats_per_code": score(texts, codes),
        "nats_per_code_of_other_captions": score(texts[order], codes),
        "nats_per_code_without_caption": score(np.full_like(texts, END), codes),
    }


def judged(
    cfg: "Config",
    draw: Draw,
    images: Captioned,
    known: tuple[np.ndarray, np.ndarray],
    tokenizer: ImageTokenizer,
) -> dict[str, float]:
    """Has an independent reader read new digits, real ones and their reconstructions.

    Strokes and slants are asked for and looked at in the outer thirds alone.
    """
    labels, test_labels = known
    train, test = (captions.light(x)[..., 0] for x in (images.train_images, images.test_images))
    again = tokenizer.decode(tokenizer.encode(test[..., None]))[..., 0]
    digits = np.repeat(np.arange(10), cfg.each)
    kinds = [captions.plain(digit)[i % 3] for i, digit in enumerate(digits.tolist())]
    shown = {"real_digits_read_right": (test, test_labels)}
    shown |= {"reconstructions_read_right": (again, test_labels)}
    for scale in cfg.scales:
        shown[f"new_read_as_asked_at_scale_{scale:g}"] = draw(kinds, scale)[..., 0], digits
    reader = digit_reader.train_reader(images.train_images[..., 0], labels, ink="grey")
    read = {n: digit_reader.read(reader, ink).argmax(axis=-1) for n, (ink, _) in shown.items()}
    found = {name: float((read[name] == told).mean()) for name, (_, told) in shown.items()}

    measure = Measure.of(train, labels)
    combined = list(itertools.product(range(10), (0, 2), (0, 2)))
    asked = np.repeat(combined, math.ceil(cfg.each / 4), axis=0)
    new = draw([captions.attributed(*row) for row in asked.tolist()], cfg.scale)[..., 0]
    real = np.stack([test_labels, *measure.read(test, test_labels)], axis=1)
    outer = (real[:, 1:] != 1).all(axis=1)
    measured = {"reconstructions": (again[outer], real[outer]), "new": (new, asked)}
    for name, (ink, told) in measured.items():
        stroke, slant = measure.read(ink, told[:, 0])
        found[f"{name}_with_stroke_asked"] = float((stroke == told[:, 1]).mean())
        found[f"{name}_with_slant_asked"] = float((slant == told[:, 2]).mean())
    return found


def show(record: run.Run, cfg: "Config", draw: Draw, images: Captioned, joint: Joint) -> None:
    """Draws the pictures."""
    grey = images.train_images.shape[-1] == 1
    grid = pictures.digit_grid if grey else pictures.image_grid

    def put(name: str, ink: np.ndarray, labels: Sequence[str], title: str) -> None:
        ink = ink.reshape(len(labels), -1, *images.train_images.shape[1:])
        grid(ink[..., 0] if grey else ink, record.folder / name, row_labels=labels, title=title)

    asked = [*cfg.ask, *examples(images)]
    put("samples.png", draw(np.repeat(asked, 10).tolist(), cfg.scale), asked, "")
    row = [captions.plain(digit)[0] for digit in range(10)] if images.labels else asked[-10:]
    lines = [draw(row, scale) for scale in cfg.scales]
    sheet = np.stack(lines) if not grey else 1 - np.stack(lines)  # ink is dark
    scales = [f"scale {scale:g}" for scale in cfg.scales]
    pictures.image_grid(sheet, record.folder / "guidance.png", scales, row)
    some = captions.light(images.test_images[:12])
    rows = [some, joint.image.decode(joint.image.encode(some))]
    put("codes.png", np.stack(rows), ["held out", "from its codes"], "")
    log = records.read_metrics(record.folder / "metrics.jsonl")
    curve = {"train": "image", "evaluations": ["validation"], "unit": "nats per code"}
    pictures.loss_curve(log, record.folder / "loss.png", **curve)


def examples(images: Captioned) -> list[str]:
    """Captions to be drawn: of digits some of each kind, else those of held-out images."""
    if images.labels is None:
        return [several[0] for several in images.test_captions[:10]]
    told = [captions.attributed(digit, digit % 2 * 2, digit // 2 % 2 * 2) for digit in range(5)]
    return [*told, *(captions.plain(digit)[digit % 3] for digit in range(5, 10))]
