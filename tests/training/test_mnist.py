import gzip
import importlib
import pathlib
import struct

import numpy as np
import pytest

from jaxformer.training import mnist, tfds

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx(array):
    """The bytes of an IDX file, from its description."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def parts():
    rng = np.random.default_rng(5)
    return {
        "train_images": rng.integers(256, size=(17, 28, 28), dtype=np.uint8),
        "train_labels": rng.integers(10, size=17, dtype=np.uint8),
        "test_images": rng.integers(256, size=(5, 28, 28), dtype=np.uint8),
        "test_labels": rng.integers(10, size=5, dtype=np.uint8),
    }


@pytest.fixture
def folder(tmp_path, parts):
    for part, array in parts.items():
        if "train" in part:
            (tmp_path / NAMES[part]).write_bytes(idx(array))
        else:
            (tmp_path / f"{NAMES[part]}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_the_embedded_digits_are_what_their_licence_says():
    digits = mnist.load()
    assert digits.origin == "embedded"
    assert digits.train_images.shape == (10_000, 28, 28)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert (np.bincount(digits.train_labels) == 1_000).all()
    assert (np.bincount(digits.test_labels) == 200).all()
    assert 0.12 < digits.train_images.mean() / 255 < 0.14  # the whole set: 0.1307
    licence = pathlib.Path(mnist.__file__).with_name("mnist_10k2k.LICENSE").read_text()
    for words in ("CC BY-SA 3.0", "LeCun", "Cortes", "What was changed"):
        assert words in licence


def test_the_embedded_digits_are_the_first_of_each_class_of_the_whole_set(real_data):
    embedded, whole = mnist.load(), mnist.load(str(real_data / "mnist"))
    assert (len(whole.train_images), len(whole.test_images)) == (60_000, 10_000)
    for split, count in (("train", 1_000), ("test", 200)):
        images, labels = (getattr(whole, f"{split}_{part}") for part in ("images", "labels"))
        first = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
        np.testing.assert_array_equal(getattr(embedded, f"{split}_images"), images[first])
        np.testing.assert_array_equal(getattr(embedded, f"{split}_labels"), labels[first])


def test_idx_files_are_read_packed_or_not(folder, parts):
    digits = mnist.load(str(folder))
    for part, array in parts.items():
        np.testing.assert_array_equal(getattr(digits, part), array)
    assert digits.train_labels.dtype == np.int32


def test_tensorflow_datasets_gives_the_whole_set_in_another_order(real_data):
    for package in ("tensorflow_datasets", "importlib_resources", "PIL"):
        pytest.importorskip(package)
    ours = mnist.load(str(real_data / "mnist"))
    theirs = mnist.load(f"tfds:{real_data / 'tfds'}")
    assert theirs.train_labels[:16].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6, 6, 4, 7, 7, 3, 3]
    for split in ("train", "test"):
        images, labels = f"{split}_images", f"{split}_labels"
        for label in range(10):
            mine, other = (
                np.sort(getattr(d, images)[getattr(d, labels) == label].sum((1, 2), np.int64))
                for d in (ours, theirs)
            )
            np.testing.assert_array_equal(mine, other)


def test_a_prepared_set_that_is_cut_short_is_named(real_data, tmp_path):
    for package in ("tensorflow_datasets", "importlib_resources", "PIL"):
        pytest.importorskip(package)
    version = tmp_path / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    for path in (real_data / "tfds" / "mnist" / "3.0.1").iterdir():
        content = path.read_bytes()
        (version / path.name).write_bytes(content[:9_000] if "train." in path.name else content)
    with pytest.raises(
        ValueError, match=r"3\.0\.1 \(split 'train'\): expected MNIST in array_record"
    ):
        mnist.load(f"tfds:{version}")


def test_a_missing_package_is_told_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"tensorflow_datasets: pip install 'jaxformer\[data\]'"
    ):
        mnist.load(f"tfds:{tmp_path}")


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.1", "3.0.10", "2.9.9"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
    for place in (tmp_path, tmp_path / "mnist"):
        assert tfds.newest(place, "mnist").name == "3.0.10"


def replaced(folder, part, content):
    path = folder / NAMES[part]
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    path.write_bytes(content(path.read_bytes()))


@pytest.mark.parametrize(
    ("part", "content", "told"),
    [
        ("train_images", lambda b: b[:-3], r"train-images.*: expected 13344 bytes.*found 13341"),
        ("train_images", lambda b: b + b"\0", r"train-images.*: expected 13344.*found 13345"),
        ("train_labels", lambda b: b[:6], r"train-labels.*header of 8 bytes, found 6"),
        ("train_labels", lambda _: b"", r"train-labels.*begins with 00 00 08 01, found an empty"),
        ("train_images", lambda b: b"\x89PNG" + b[4:], r"train-images.*found 89 50 4e 47"),
        (
            "train_images",
            lambda b: b[:3] + b"\1" + b[4:],
            r"train-images.*00 00 08 03, found 00 00 08 01",
        ),
        ("test_images", lambda b: b[: len(b) // 2], r"t10k-images.*gz: expected a whole gzip file"),
        (
            "test_images",
            lambda b: b[:99] + b"\xff" * 9 + b[108:],
            r"t10k-images.*gz: expected a whole gzip",
        ),
        ("test_labels", lambda _: b"not gzip", r"t10k-labels.*gz: expected a whole gzip file"),
        (
            "train_images",
            lambda _: idx(np.zeros((17, 28, 27), np.uint8)),
            r"train-images.*expected images of 28x28, found 17x28x27",
        ),
        (
            "train_images",
            lambda _: idx(np.zeros((0, 28, 28), np.uint8)),
            r"train-images.*found 0x28x28",
        ),
        (
            "train_labels",
            lambda _: idx(np.zeros(16, np.uint8)),
            r"train-labels.*expected 17 labels.*train-images.*found 16",
        ),
        (
            "train_labels",
            lambda _: idx(np.array([3] * 9 + [10, 255] + [0] * 6, np.uint8)),
            r"train-labels.*labels from 0 to 9, found 10 at row 9 \(2 such",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_name(folder, part, content, told):
    replaced(folder, part, content)
    with pytest.raises(ValueError, match=told):
        mnist.load(str(folder))


def test_missing_folders_and_files_are_named_with_what_was_expected(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such folder; .*train-images-idx3-ubyte"
    ):
        mnist.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    for origin in (str(tmp_path / "empty"), f"tfds:{tmp_path / 'empty'}"):
        with pytest.raises(FileNotFoundError, match=r"empty: expected .*found n"):
            mnist.load(origin)
    (folder / f"{NAMES['test_labels']}.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected t10k-labels-idx1-ubyte or .*\.gz, found"
    ):
        mnist.load(str(folder))


def test_threshold_cuts_above_half():
    images = np.full((1, 28, 28), 127, np.uint8)
    images[0, 0, :2] = [128, 255]
    binary = mnist.threshold(images)
    assert binary.dtype == np.uint8
    assert binary.sum() == binary[0, 0, :2].sum() == 2


def test_dynamic_draws_ink_as_often_as_the_pixel_is_dark():
    images = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 28, 28))
    draws = [mnist.dynamic(images, np.random.default_rng(seed)) for seed in range(4)]
    share = np.mean(draws, axis=(0, 2, 3))
    assert draws[0].dtype == np.uint8
    assert (share[[0, 255]] == [0, 1]).all()
    # Four standard deviations of the mean of 3136 coins, over 256 grey values.
    np.testing.assert_allclose(share, np.arange(256) / 255, atol=4.5 * 0.5 / 56)
    assert (draws[0] != draws[1]).any()
    np.testing.assert_array_equal(mnist.dynamic(images, np.random.default_rng(2)), draws[2])
