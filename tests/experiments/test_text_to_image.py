"""The experiment in small: what it learns from, draws and leaves, and what it refuses."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import captions, digit_reader, image_codes, strokes, text_to_image
from experiments import text_to_image_report as report
from experiments.captions import Captioned, CaptionError, Joint
from experiments.image_codes import CodesError
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig
from jaxformer.models.vqvae import ConvCoder
from jaxformer.tokenizers.vq import VQTokenizer
from jaxformer.training import checkpoint, mesh

MODEL = TransformerConfig(1, 8, 1, 2, 2, 4, 8, positions="learned", max_length=1)
CODES = image_codes.Config((3, 2), 4, ConvCoder(4, 4, 1), steps=3, batch=4)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A file of 40 images of four classes in colour."""
    path = tmp_path_factory.mktemp("images") / "emoji.npz"
    random, kinds = np.random.default_rng(0), np.arange(40) % 4
    x = (kinds[:, None, None, None] * 60 + random.integers(0, 60, (40, 8, 8, 3))).astype(np.uint8)
    names = [f"n{n}" for n in range(40)]
    np.savez(path, x=x, y=kinds, names=names, label_names=["ox", "cat", "dog", "bee"])
    return f"npz:{path}"


def config(folder, data, **changes):
    settings = {"run": str(folder), "data": data, "codes": CODES, "bpe": 259, "model": MODEL}
    settings |= {"ask": ("n1",), "scales": (1.0, 3.0), "steps": 6, "batch": 4, "warmup": 2}
    settings |= {"mesh": "data=1", "save_every": 2, "log_every": 1}
    return text_to_image.Config(**settings | changes)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def few():
    """Draws few images at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def whole(emoji, few, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    assert text_to_image.main(config(folder, emoji)) == 0
    return folder


def test_a_run_leaves_report_pictures_and_tokenizer(whole):
    found = json.loads((whole / "report.json").read_text())
    assert found["codes_per_image"] == 4
    assert found["vocabulary"] == 259 + 6
    nats = [value for name, value in found.items() if name.startswith("nats_per_code")]
    assert len(nats) == 3
    assert all(0 < value < 9 for value in nats)
    assert not any("digits" in name or "asked" in name for name in found)
    for name in ("samples", "guidance", "codes", "loss"):
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    read = [(row["step"], row["validation"]) for row in rows(whole) if "validation" in row]
    assert [step for step, _ in read] == [2, 4, 6]
    assert read[-1][1] == pytest.approx(found["nats_per_code"], rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_numbers_with_the_tokenizer_of_before(
    whole, emoji, few, tmp_path, stopped, monkeypatch
):
    cfg = config(tmp_path, emoji, tokenizer=str(whole / "codes" / "tokenizer"))
    stopped(text_to_image, cfg, 3)
    assert text_to_image.main(cfg) == 0
    assert rows(tmp_path) == rows(whole)
    same = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole)]
    assert same[0] == same[1]
    with pytest.raises(checkpoint.CheckpointError, match=r"drop: 0\.1 there, 0\.5 here"):
        text_to_image.main(dataclasses.replace(cfg, drop=0.5))


@pytest.fixture(scope="module")
def joint():
    """A vocabulary whose images are 4 of 6 codes; its tokenizer is not trained."""
    model = CODES.model((8, 8), 1)
    zeros = np.zeros((2, 8, 8, 1), np.uint8)
    codes = VQTokenizer(model, jax.jit(model.init)(jax.random.key(0), zeros / np.float32(1)))
    images = Captioned(zeros, [("ab",), ("b",)], zeros, [("a",)] * 2, None)
    text, length = captions.learn(images, 257)
    return Joint(text, codes, length)


@pytest.fixture(scope="module")
def model(joint, draw):
    sizes = {"vocab_size": joint.vocab_size, "max_length": joint.length + joint.codes}
    made = Decoder(dataclasses.replace(MODEL, **sizes))
    return made, draw(made, jnp.zeros((1, 2), jnp.int32), seed=3)


def test_a_drawing_is_what_whole_sequences_give_code_by_code(few, joint, model):
    decoder, params = model
    asked, text, size = ["ab", "b", "", "a"], joint.text.vocab_size, joint.length + joint.codes
    drawn = report.make_drawer(decoder, params, joint, 5, mesh.make("data=1"))(asked, 3.0)
    told = np.zeros((2, 4, 1 + size), np.int32)
    told[0, :, 1 : 1 + joint.length] = joint.read(asked)
    apply, key = jax.jit(decoder.apply), jax.random.fold_in(jax.random.key(5), 0)
    for step in range(joint.codes):
        at = joint.length + step
        one, other = (np.asarray(apply(params, part[:, :size]))[:, at] for part in told)
        logits = np.where(np.arange(one.shape[1]) < text, -np.inf, 3 * one - 2 * other)
        told[:, :, at + 1] = jax.random.categorical(jax.random.fold_in(key, step + 1), logits)
    np.testing.assert_allclose(drawn, joint.draw(told[0, :, -joint.codes :]), atol=1e-5)
    assert len(np.unique(told[0, :, -joint.codes :])) > 3


def test_more_captions_than_rows_are_each_drawn(few, joint, model):
    images = report.make_drawer(*model, joint, 5, mesh.make("data=2"))(["ab"] * 9, 1.0)
    assert images.shape == (9, 8, 8, 1)
    assert len(np.unique(images.reshape(9, -1), axis=0)) > 1


def test_nats_of_codes_are_those_after_the_caption(few, joint, model):
    decoder, params = model
    texts = joint.read(["ab", "b", "a", "", "b"])
    codes = np.random.default_rng(0).integers(joint.text.vocab_size, joint.vocab_size, (5, 4))
    score = report.make_scorer(decoder, joint, mesh.make("data=1"))
    known = np.concatenate([np.zeros((5, 1), int), texts, codes], axis=1).astype(np.int32)
    each = np.asarray(jax.nn.log_softmax(decoder.apply(params, jnp.asarray(known[:, :-1]))))
    each = np.take_along_axis(each[:, joint.length :], codes[..., None], axis=-1)
    expected = pytest.approx(-each.mean(), rel=1e-5)
    assert score(params, texts, codes.astype(np.int32)) == expected


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_loss_counts_one_end_of_a_caption_and_weighs_codes_seven_times(drop):
    table = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    stub = types.SimpleNamespace(apply=lambda _, tokens, **options: jnp.asarray(table)[tokens])
    cfg = text_to_image.Config(drop=drop)
    batch = {
        "texts": np.array([[[1, 2, 0, 0]], [[3, 0, 0, 0]]]),
        "codes": np.array([[[5, 6]], [[6, 4]]]),
    }
    loss = text_to_image.make_loss(cfg, stub, 4)
    found = jax.device_get(loss(None, jax.tree.map(jnp.asarray, batch), jax.random.key(0)))
    whole, found = float(found[0]), {name: float(value) for name, value in found[1].items()}
    nats = np.log(np.exp(table).sum(1, keepdims=True)) - table
    none = [(0, 0)]
    told = none * 2 if drop else [(0, 1), (1, 2), (2, 0), (0, 3), (3, 0)]
    assert found["text"] == pytest.approx(np.mean([nats[pair] for pair in told]), rel=1e-5)
    seen = [(0, 5), (5, 6), (0, 6), (6, 4)]
    assert found["image"] == pytest.approx(np.mean([nats[pair] for pair in seen]), rel=1e-5)
    assert whole == pytest.approx(found["text"] / 8 + found["image"] * 7 / 8, rel=1e-5)


def test_an_image_is_learned_where_it_stands_and_moved():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 1)).astype(np.uint8)
    stub = types.SimpleNamespace(encode=lambda x: np.rint(255 * x).astype(int).reshape(len(x), -1))
    joint = types.SimpleNamespace(image=stub, text=types.SimpleNamespace(vocab_size=1000))
    found = Joint.look_moved(joint, pixels, 3, 1, 0) - 1000
    np.testing.assert_array_equal(found[:, 0], pixels.reshape(5, -1))
    edges = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = [edges[:, y : y + 4, x : x + 3].reshape(5, -1) for y in range(3) for x in range(3)]
    same = (found[:, 1:, None] == np.stack(shifts, axis=1)[:, None]).all(axis=-1)
    assert same.any(axis=-1).all()
    assert same.any(axis=(0, 1)).sum() > 4  # fifteen draws of nine shifts


def test_each_image_gets_one_of_its_rows():
    rows = jnp.arange(24).reshape(2, 4, 3)
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = np.asarray(jax.vmap(text_to_image.one_of, (0, None))(keys, rows))
    assert {tuple(row) for row in drawn[:, 0].tolist()} == {tuple(r) for r in rows[0].tolist()}
    assert {tuple(row) for row in drawn[:, 1].tolist()} == {tuple(r) for r in rows[1].tolist()}
    assert (drawn[:, 0, 0] // 3 != drawn[:, 1, 0] // 3 - 4).any()  # each its own


def test_digits_are_judged_by_a_reader_by_stroke_and_by_slant(monkeypatch):
    random = np.random.default_rng(1)
    ink = np.zeros((60, 28, 28), np.float32)
    ink[:, 5:25, 12:15] = 1
    for image, width in zip(ink, random.integers(0, 5, 60)):
        image[5:25, 15 : 15 + width] = 1
    labels = np.arange(60) % 10
    pixels = (255 * ink[..., None]).astype(np.uint8)
    images = Captioned(pixels, [], pixels, [], (labels, labels))
    same = types.SimpleNamespace(encode=lambda x: x, decode=lambda x: x)
    thick = strokes.Measure.of(ink, labels).read(ink, labels)[0] == 2

    def drawn(asked, scale):
        """The digit asked for at scale 1, and nobody's digit at others; all strokes are thick."""
        named = [next((d for d, n in enumerate(captions.DIGITS) if n in a), a[-1]) for a in asked]
        found = np.repeat(ink[thick][:1], len(asked), axis=0)
        found[:, 0, 0] = [int(digit) / 20 if scale == 1 else 0.5 for digit in named]
        return found[..., None]

    def read(_, ink):
        ink = np.asarray(ink)
        told = np.where(ink[:, 0, 0] > 0, 20 * ink[:, 0, 0], 0).round().astype(int)
        return np.eye(11)[told]

    monkeypatch.setattr(digit_reader, "train_reader", lambda *_, **options: None)
    monkeypatch.setattr(digit_reader, "read", read)
    cfg = text_to_image.Config(each=3, scales=(1.0, 2.0))
    found = report.judged(cfg, drawn, images, (labels, labels), same)
    assert found["real_digits_read_right"] == found["reconstructions_read_right"] == 0.1
    assert found["new_read_as_asked_at_scale_1"] == 1
    assert found["new_read_as_asked_at_scale_2"] == 0
    assert found["new_with_stroke_asked"] == pytest.approx(0.5, abs=0.2)
    assert found["reconstructions_with_stroke_asked"] == 1


def test_every_setting_is_written_on_the_command_line():
    cfg = tyro.cli(
        text_to_image.Config, args=["--ask", "a two", "a one", "--codes.levels", "4", "4"]
    )
    assert cfg.ask == ("a two", "a one")
    assert cfg.codes.levels == (4, 4)
    codes = text_to_image.Config().codes
    assert dataclasses.replace(cfg, ask=(), codes=codes) == text_to_image.Config()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stpes", "3"], "--steps"),
        (["--bpe", "256"], "bpe must be at least 257, got 256"),
        (["--drop", "1.5"], "drop must lie in [0, 1], got 1.5"),
    ],
)
def test_a_wrong_flag_or_value_is_refused_with_what_is_allowed(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(text_to_image.Config, args=arguments)
    assert stopped.value.code == 2
    assert told in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)


def test_a_tokenizer_of_other_images_and_a_long_caption_are_refused_before_training(
    whole, emoji, tmp_path
):
    tokenizer = str(whole / "codes" / "tokenizer")
    refused = functools.partial(config, tmp_path, tokenizer=tokenizer)
    with pytest.raises(CodesError, match=r"for images of \(8, 8, 3\), got \(28, 28, 1\)"):
        text_to_image.main(refused("embedded"))
    with pytest.raises(CaptionError, match="leaves room for"):
        text_to_image.main(refused(emoji, ask=("an elephant in a very large room",)))
    with pytest.raises(CodesError, match="holds no image tokenizer"):
        text_to_image.main(config(tmp_path, emoji, tokenizer=str(tmp_path)))
