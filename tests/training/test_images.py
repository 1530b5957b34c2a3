"""Images of every origin arrive as the same bytes, and what is wrong is told with its file."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxformer.training import image_files, images, mnist

RGB = np.random.default_rng(3).integers(256, size=(5, 7, 3), dtype=np.uint8)


def written(path, pixels: Any = RGB, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path):
    """Three classes of 4, 5 and 6 images, each filled with its class and number."""
    for label, name in enumerate(("ant", "bee", "Cat")):
        for number in range(4 + label):
            pixels = np.full((5, 7, 3), 10 * label + number, np.uint8)
            written(tmp_path / name / f"{number}.png", pixels)
    return tmp_path


def test_the_embedded_digits_get_a_channel():
    loaded, digits = images.load(), mnist.load()
    assert loaded.label_names == tuple("0123456789")
    assert loaded.origin == "embedded"
    for split in ("train", "test"):
        pixels, labels = (getattr(loaded, f"{split}_{part}") for part in ("images", "labels"))
        np.testing.assert_array_equal(pixels[..., 0], getattr(digits, f"{split}_images"))
        np.testing.assert_array_equal(labels, getattr(digits, f"{split}_labels"))
        assert pixels.shape[1:] == (28, 28, 1)


def test_sub_folders_are_classes_and_every_image_is_on_one_side(classes):
    loaded = images.load(str(classes), held_out=0.4)
    assert loaded.label_names == ("Cat", "ant", "bee")  # by code point, on every machine
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == np.int32
    pixels = np.concatenate([loaded.train_images, loaded.test_images])
    labels = np.concatenate([loaded.train_labels, loaded.test_labels])
    values = pixels[:, 0, 0, 0]
    assert (pixels == values[:, None, None, None]).all()
    assert sorted(values) == [*range(4), *range(10, 15), *range(20, 26)]
    np.testing.assert_array_equal((labels + 2) % 3, values // 10)
    for order in (loaded.train_labels, loaded.test_labels):
        assert (np.diff(order) >= 0).all()


def test_what_is_held_out_stays_so_when_files_come_and_the_share_grows(classes):
    def tested(share):
        return set(images.load(f"folder:{classes}", held_out=share).test_images[:, 0, 0, 0])

    small, large = tested(0.3), tested(0.6)
    assert small < large
    written(classes / "ant" / "9.png", np.full((5, 7, 3), 9, np.uint8))
    assert tested(0.3) - {9} == small
    assert tested(0.0) == set()


def test_the_share_held_out_is_the_share_asked_for(tmp_path):
    x = np.zeros((2000, 1, 1), np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.zeros(2000, int))
    for share in (0.1, 0.5):
        test = images.load(f"npz:{tmp_path / 'x.npz'}", held_out=share).test_images
        assert abs(len(test) / 2000 - share) < 4 * np.sqrt(share * (1 - share) / 2000)


def test_a_folder_without_classes_has_no_label_names(tmp_path):
    for number in range(20):
        written(tmp_path / f"{number}.jpg", np.full((5, 7), 99, np.uint8), quality=95)
    (tmp_path / "about.txt").write_text("no image")
    written(tmp_path / ".hidden.png")
    (tmp_path / ".cache").mkdir()
    loaded = images.load(str(tmp_path), held_out=0.0)
    assert loaded.label_names == ()
    assert not loaded.train_labels.any()
    assert len(loaded.train_images) == 20
    assert loaded.train_images.shape[1:] == (5, 7, 1)  # grey, as all are
    written(tmp_path / "red.png", np.full((5, 7, 3), [255, 0, 0], np.uint8))
    loaded = images.load(str(tmp_path), held_out=0.0)
    assert loaded.train_images.shape == (21, 5, 7, 3)
    assert (loaded.train_images[-1] == [255, 0, 0]).all()
    np.testing.assert_allclose(loaded.train_images[:-1], 99, atol=1)


def palette(first=(10, 20, 30), second=(200, 100, 50)):
    image = Image.new("P", (7, 5))
    image.putpalette([*first, *second])
    image.putdata([0, 1] * 17 + [0])
    return image


COLOURS = np.array([[10, 20, 30], [200, 100, 50]] * 17 + [[10, 20, 30]]).reshape(5, 7, 3)
ALPHA = np.arange(35, dtype=np.uint8).reshape(5, 7, 1) * 7
OVER_WHITE = np.round(255 + (RGB - 255.0) * ALPHA / 255)
DEEP = np.random.default_rng(5).integers(65536, size=(5, 7), dtype=np.uint16)


@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (RGB, {}, RGB),
        (RGB[..., :1], {}, RGB[..., :1]),
        (RGB[..., 0] > 99, {}, 255.0 * (RGB[..., :1] > 99)),
        (np.concatenate([RGB, ALPHA], -1), {}, OVER_WHITE),
        (np.concatenate([RGB[..., :1], ALPHA], -1), {}, OVER_WHITE[..., :1]),
        (palette(), {}, COLOURS),
        (palette((9,) * 3, (99,) * 3), {}, np.where(COLOURS[..., :1] == 10, 9, 99)),
        (palette(), {"transparency": 1}, np.where(COLOURS == [200, 100, 50], 255, COLOURS)),
        (RGB, {"transparency": tuple(RGB[2, 3].tolist())}, None),
        (DEEP, {}, np.round(DEEP[..., None] / 257)),
    ],
    ids=[
        "rgb",
        "grey",
        "bits",
        "rgba",
        "la",
        "palette",
        "grey-palette",
        "clear-palette",
        "clear-rgb",
        "16-bit",
    ],
)
def test_png_files_of_every_mode_are_converted(pixels, options, expected, tmp_path):
    if expected is None:
        expected = RGB.astype(int)
        expected[2, 3] = 255
    if isinstance(pixels, np.ndarray) and pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    decoded = image_files.decode(written(tmp_path / "x.png", pixels, **options))
    np.testing.assert_allclose(decoded, expected, atol=1)
    assert decoded.shape == expected.shape


def test_a_clear_level_of_16_bits_is_white(tmp_path):
    image = Image.fromarray(DEEP)
    path = written(tmp_path / "x.png", image, transparency=int(DEEP[1, 2]))
    expected = np.round(DEEP / 257)
    expected[1, 2] = 255
    np.testing.assert_allclose(image_files.decode(path)[..., 0], expected, atol=1)


def smooth(size=(40, 56)):
    down, across = np.mgrid[: size[0], : size[1]] / 56
    return (255 * np.stack([down, across, 0.3 + 0 * down], -1)).astype(np.uint8)


def test_cmyk_files_have_the_colours_of_their_rgb(tmp_path):
    expected = smooth()
    path = written(tmp_path / "x.jpg", Image.fromarray(expected).convert("CMYK"), quality=98)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    np.testing.assert_allclose(image_files.decode(path), expected, atol=6)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_turned_as_their_exif_data_tells(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # quarter turns against the clock to be upright
    path = written(tmp_path / "x.jpg", smooth(), quality=98, exif=exif)
    np.testing.assert_allclose(image_files.decode(path), np.rot90(smooth(), turns), atol=6)


def test_images_are_cut_about_their_centre_and_resized(tmp_path):
    bands = np.repeat(np.array([0, 90, 180, 250], np.uint8), 20)  # of columns
    wide = written(tmp_path / "wide.png", np.tile(bands, (40, 1)))
    cut = image_files.decode(wide, (20, 20))[..., 0]
    assert cut.shape == (20, 20)
    np.testing.assert_allclose(cut[:, 1:8], 90, atol=2)  # but for ringing at the edges
    np.testing.assert_allclose(cut[:, 12:-1], 180, atol=2)
    tall = written(tmp_path / "tall.png", np.tile(bands, (40, 1)).T)
    np.testing.assert_array_equal(image_files.decode(tall, (20, 20))[..., 0], cut.T)
    assert image_files.decode(wide, (10, 30)).shape == (10, 30, 1)


def test_size_is_kept_whatever_the_origin(classes, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.full((40, 8, 6, 3), 99, np.uint8), y=np.arange(40) % 3)
    for origin in ("embedded", str(classes), f"npz:{tmp_path / 'x.npz'}"):
        for size, expected in ((11, (11, 11)), ((9, 13), (9, 13))):
            if origin == "embedded" and size == 11:
                continue  # the slow one need not be done twice
            loaded = images.load(origin, size=size, held_out=0.3)
            assert loaded.train_images.shape[1:3] == loaded.test_images.shape[1:3] == expected
    assert (loaded.train_images == 99).all()


@pytest.mark.parametrize("most", [1, 16, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_values_up_to_1_16_or_255_are_stretched_to_bytes(most, dtype, tmp_path):
    x = np.linspace(0, most, 40 * 6).astype(dtype).reshape(40, 3, 2)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 4)
    loaded = images.load(f"npz:{tmp_path / 'x.npz'}", held_out=0.0)
    assert loaded.train_images.dtype == np.uint8
    np.testing.assert_allclose(loaded.train_images[..., 0], x * (255 / most), atol=0.501)
    assert loaded.label_names == tuple("0123")


def test_packed_bits_become_ink(tmp_path):
    bits = np.random.default_rng(2).integers(2, size=(30, 5, 7))
    arrays = {
        "packed": np.packbits(bits.reshape(30, -1).astype(np.uint8), axis=-1),
        "shape": np.array([5, 7]),
        "character": np.arange(30) % 3,
        "character_names": np.array(["x/1", "x/2", "y/1"]),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    loaded = images.load(f"npz:{tmp_path / 'x.npz'}", held_out=0.0)
    np.testing.assert_array_equal(loaded.train_images[..., 0], 255 * bits)
    np.testing.assert_array_equal(loaded.train_labels, arrays["character"])
    assert loaded.label_names == ("x/1", "x/2", "y/1")
    np.savez(tmp_path / "x.npz", **arrays | {"shape": np.array([5, 9])})
    with pytest.raises(ValueError, match=r"x.npz: expected images of 5x9 bits .* 6 bytes, found"):
        images.load(f"npz:{tmp_path / 'x.npz'}")


def test_real_files_have_their_classes(real_data):
    for name, count, shape, classes in (
        ("digits8x8", 1797, (8, 8, 1), "0"),
        ("twemoji32", 1654, (32, 32, 3), "Activities"),
        ("omniglot_small1", 2720, (105, 105, 1), "Balinese/character01"),
    ):
        loaded = images.load(f"npz:{real_data / 'images' / name}.npz")
        assert loaded.train_images.shape[1:] == shape
        assert len(loaded.train_images) + len(loaded.test_images) == count
        assert loaded.train_images.max() == 255
        assert loaded.label_names[0] == classes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set as tensorflow-datasets writes it, of 7 + 5 images of 32x32 in three classes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=["airplane", "automobile", "bird"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(7), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for number in range(count):
                png = io.BytesIO()
                Image.fromarray(np.full((32, 32, 3), [number, 0, 9], np.uint8)).save(png, "png")
                png.seek(0)
                yield number, {"id": f"{number}", "image": png, "label": number % 3}

    folder = tmp_path_factory.mktemp("tfds")
    Cifar10(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_prepared_sets_are_read_with_the_names_of_their_classes(prepared):
    for folder in (prepared, prepared / "cifar10", prepared / "cifar10" / "3.0.2"):
        loaded = images.load(f"tfds:{folder}")
        assert loaded.label_names == ("airplane", "automobile", "bird")
        for pixels, labels, count in (
            (loaded.train_images, loaded.train_labels, 7),
            (loaded.test_images, loaded.test_labels, 5),
        ):
            assert pixels.shape == (count, 32, 32, 3)
            assert sorted(pixels[:, 3, 5, 0]) == list(range(count))
            np.testing.assert_array_equal(labels, pixels[:, 3, 5, 0] % 3)
            assert (pixels[..., 1:] == [0, 9]).all()


def test_one_of_several_prepared_sets_must_be_named(prepared):
    (prepared / "mnist").mkdir()
    with pytest.raises(ValueError, match=r"one set, found mnist, cifar10; name it: tfds:.*/mnist"):
        images.load(f"tfds:{prepared}")
    (prepared / "mnist").rmdir()


def test_a_prepared_set_that_is_cut_short_is_named(prepared, tmp_path):
    for path in (prepared / "cifar10" / "3.0.2").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:300] if "test." in path.name else content)
    with pytest.raises(ValueError, match=r"\(split 'test'\): expected labelled images in array_"):
        images.load(f"tfds:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("ant/0.png", lambda b: b[:100], r"ant/0.png: expected a PNG or JPEG image, found"),
        ("ant/0.png", lambda b: b[:40], r"ant/0.png: expected a PNG or JPEG image, found"),
        ("bee/x.jpg", lambda _: b"words", r"bee/x.jpg: expected .* cannot identify image file"),
        ("bee/x.jpg", lambda _: b"", r"bee/x.jpg: expected .* cannot identify image file"),
        ("x.png", lambda _: b"", r"x.png: expected every image in a class.* Cat to bee; found it"),
    ],
)
def test_damaged_and_misplaced_files_are_named(name, content, told, classes):
    written(classes / "ant" / "0.png")
    path = classes / name
    path.write_bytes(content(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ValueError, match=told):
        images.load(str(classes))


def test_a_file_of_images_alone_has_no_classes(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 4, 5, 3), np.uint8))
    found = images.load(f"npz:{tmp_path / 'x.npz'}")
    assert found.label_names == ()
    assert (found.train_labels == 0).all()
    assert len(found.train_images) + len(found.test_images) == 40


def test_a_jpeg_that_is_cut_short_is_named(tmp_path):
    path = written(tmp_path / "x.jpg", np.tile(RGB, (40, 40, 1)), quality=95)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"x\.jpg: .*truncated"):
        images.load(str(tmp_path), held_out=0.0)


def test_images_of_other_sizes_need_a_size(classes):
    written(classes / "bee" / "3.png", np.zeros((5, 8), np.uint8))
    with pytest.raises(ValueError, match=r"bee/3.png: .* of 5x7, as 0.png is, found 5x8; `size`"):
        images.load(str(classes))
    assert images.load(str(classes), size=6, held_out=0.4).train_images.shape[1:] == (6, 6, 3)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": None}, r"x\.npz: expected x, found no x"),
        ({"x": np.zeros((6, 4))}, r"x\.npz: expected rows of grey or RGB .*\(6, 4\)"),
        ({"x": np.zeros((6, 4, 4, 2))}, r"expected rows of grey or RGB .*\(6, 4, 4, 2\)"),
        ({"x": np.full((6, 4, 4), 256)}, r"x\.npz: expected x from 0 to 1, 16 or 255.* to 256"),
        ({"x": np.full((6, 4, 4), -0.5)}, r"expected x from 0 to 1, 16 or 255.* from -0.5"),
        ({"x": np.full((6, 4, 4), np.nan)}, r"expected x from 0 to 1, 16 or 255.* nan"),
        ({"x": np.zeros((0, 4, 4))}, r"expected x from 0 to 1.*float64 of \(0, 4, 4\)"),
        ({"x": np.full((6, 4, 4), "a")}, r"expected x from 0 to 1.*<U1 of \(6, 4, 4\)"),
        ({"y": np.arange(5)}, r"x\.npz: expected 6 labels.*found 5"),
        ({"y": np.arange(6) - 1}, r"x\.npz: expected labels from 0 to 4, found -1 at row 0"),
        ({"y": np.arange(6) / 2}, r"x\.npz: expected integers y.*float64"),
        ({"label_names": np.array(["a", "b"])}, r"labels from 0 to 1, found 2 at row 2 \(4 such"),
        ({"names": np.array(["a", "b"])}, r"x\.npz: expected 6 names, one a row, found 2"),
    ],
)
def test_what_is_wrong_with_an_npz_file_is_told_with_its_name(arrays, told, tmp_path):
    whole = {"x": np.zeros((6, 4, 4), np.uint8), "y": np.arange(6)} | arrays
    np.savez(tmp_path / "x.npz", **{k: v for k, v in whole.items() if v is not None})
    with pytest.raises(ValueError, match=told):
        images.load(f"npz:{tmp_path / 'x.npz'}")


def test_missing_and_foreign_files_are_named_with_what_was_expected(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for origin, told in (
        (f"npz:{empty}/x.npz", r"x\.npz: no such file; expected an npz file with x"),
        (f"{empty}/none", r"none: no such folder; expected one of PNG and JPEG files"),
        (f"folder:{empty}", r"empty: expected PNG or JPEG files, found none"),
        (f"folder:{tmp_path}", r"empty: expected PNG or JPEG files, found none"),
        (f"tfds:{empty}", r"empty: expected a set prepared by tensorflow-datasets, .*mnist/3"),
    ):
        with pytest.raises(FileNotFoundError, match=told):
            images.load(origin)
    for content in (b"", b"words", b"PK\3\4 and no more"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz: expected a whole npz file, found"):
            images.load(f"npz:{tmp_path / 'x.npz'}")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"held_out": 1.0}, r"\[0, 1\), got held_out=1.0"),
        ({"held_out": -0.1}, r"\[0, 1\), got held_out=-0.1"),
        ({"held_out": 1e-9}, r"held_out=1e-09 leaves 15 images to train with and 0 to test with"),
        ({"held_out": 0.999999}, r"leaves 0 images to train with and 15 to test with"),
        ({"size": 0}, "at least 1, got size=0"),
        ({"size": (3, -1)}, r"at least 1, got size=\(3, -1\)"),
    ],
)
def test_shares_and_sizes_that_cannot_be_are_told(options, told, classes):
    with pytest.raises(ValueError, match=told):
        images.load(str(classes), **options)
