"""Tokenizers of images: the contract, files, and the means of patches."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers import quantize
from jaxformer.models.vqvae import VQVAE, ConvCoder, ViTCoder, VQVAEConfig
from jaxformer.tokenizers import image, patch_kmeans, vq
from jaxformer.tokenizers.patch_kmeans import PatchKMeans

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((5, 8, 12, 2)).astype(np.float32)
CONV, VIT = ConvCoder(3, 2, 1), ViTCoder(4, 1, 1, 3)


def make(quantizer, coder=CONV):
    model = VQVAE(VQVAEConfig((8, 12), 2, 4, coder), quantizer)
    return vq.VQTokenizer(model, jax.jit(model.init)(jax.random.key(0), jnp.asarray(IMAGES)))


LEARNED = make(quantize.EMAVectorQuantizer(7, 2))
MEANS = PatchKMeans.train(IMAGES, (4, 4), 7, jax.random.key(0), rounds=3)


@pytest.mark.parametrize(("tokenizer", "load"), [(LEARNED, vq.load), (MEANS, patch_kmeans.load)])
def test_the_contract(tokenizer, load, tmp_path, monkeypatch):
    ids = tokenizer.encode(IMAGES)
    drawn = tokenizer.decode(ids)
    assert ids.shape == (5, 6)
    assert ids.dtype == np.int32
    assert drawn.shape == IMAGES.shape
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert tokenizer.vocab_size == 7
    assert tokenizer.bits_per_image == pytest.approx(6 * math.log2(7))
    expected = np.square(np.float64(drawn) - IMAGES).mean()
    assert tokenizer.distortion(IMAGES) == pytest.approx(expected)

    monkeypatch.setattr(image, "_ROWS", 2)  # batches do not show
    assert (tokenizer.encode(IMAGES) == ids).all()
    np.testing.assert_allclose(tokenizer.decode(ids.tolist()), drawn, atol=1e-6)
    assert tokenizer.encode(IMAGES[:0]).shape == (0, 6)
    assert tokenizer.decode(ids[:0]).shape == (0, 8, 12, 2)

    tokenizer.save(tmp_path / "new" / "folder")
    other = load(tmp_path / "new" / "folder")
    assert (other.encode(IMAGES) == ids).all()
    assert (other.decode(ids) == tokenizer.decode(ids)).all()


@pytest.mark.parametrize("tokenizer", [LEARNED, MEANS])
def test_images_and_ids_of_the_wrong_kind_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"floats of \(8, 12, 2\); got float32, \(5, 8, 12, 1\)"):
        tokenizer.encode(IMAGES[..., :1])
    with pytest.raises(ValueError, match="got uint8"):
        tokenizer.encode((IMAGES * 255).astype(np.uint8))
    with pytest.raises(ValueError, match="from 0 to 6, got 0 to 7"):
        tokenizer.decode([[0, 1, 2, 3, 4, 7]])
    with pytest.raises(ValueError, match=r"B × 6, got int64 \(1, 5\)"):
        tokenizer.decode(np.zeros((1, 5), np.int64))


@pytest.mark.parametrize(
    ("quantizer", "coder"),
    [
        (quantize.VectorQuantizer(7, 2, commitment=0.5), VIT),
        (quantize.FSQ((3, 2)), CONV),
        (quantize.GumbelQuantizer(7, 2), VIT),
    ],
)
def test_every_quantiser_and_architecture_can_be_saved(quantizer, coder, tmp_path):
    tokenizer = make(quantizer, coder)
    tokenizer.save(tmp_path)
    loaded = vq.load(tmp_path)
    assert loaded.model == tokenizer.model
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, tokenizer.variables)


def test_a_second_save_replaces_the_first_and_one_cut_short_changes_nothing(tmp_path, monkeypatch):
    MEANS.save(tmp_path)
    other = PatchKMeans(MEANS.codes[:3], MEANS.patch, MEANS.image)
    write = image.write_atomically

    def interrupted(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(image, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path)
    assert patch_kmeans.load(tmp_path).vocab_size == 7
    monkeypatch.setattr(image, "write_atomically", write)
    other.save(tmp_path)
    assert patch_kmeans.load(tmp_path).vocab_size == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_image_tokenizers_is_never_overwritten_or_removed(tmp_path):
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"weights")
    MEANS.save(tmp_path)
    PatchKMeans(MEANS.codes[:3], MEANS.patch, MEANS.image).save(tmp_path)
    assert foreign.read_bytes() == b"weights"
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="is not that of an image tokenizer"):
        MEANS.save(tmp_path)
    assert "BPE" in (tmp_path / "tokenizer.json").read_text()


def test_narrow_parameters_are_saved_wide(tmp_path):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LEARNED.variables)
    vq.VQTokenizer(LEARNED.model, narrow).save(tmp_path)
    found = vq.load(tmp_path).variables
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(jnp.float32, narrow))


def test_means_of_bytes_are_refused():
    with pytest.raises(ValueError, match="floats from 0 to 1, got uint8"):
        PatchKMeans.train(np.zeros((5, 8, 12, 2), np.uint8), (4, 4), 7, jax.random.key(0))


def test_broken_folders_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image tokenizer"):
        vq.load(tmp_path)
    LEARNED.save(tmp_path)
    with pytest.raises(ValueError, match="kind 'vqvae', not 'patch_kmeans'"):
        patch_kmeans.load(tmp_path)
    config = tmp_path / "tokenizer.json"
    whole, described = config.read_text(), json.loads(config.read_text())
    changes = {
        "no VQVAE: .*strange": {"quantizer": {"kind": "strange"}},
        "no VQVAE: .*odd": {"coder": {"kind": "conv", "odd": 1}},
        "not those of the model described: codebook": {
            "quantizer": described["quantizer"] | {"num_codes": 8}
        },
    }
    for message, change in changes.items():
        config.write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            vq.load(tmp_path)
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match="describes no image tokenizer"):
            vq.load(tmp_path)
    config.write_text(whole)
    (tensors,) = tmp_path.glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-5] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        vq.load(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="names it"):
        vq.load(tmp_path)


def test_a_quantiser_of_ones_own_works_but_is_not_saved(tmp_path):
    class Own(quantize.FSQ):
        pass

    tokenizer = make(Own((3, 2)))
    assert tokenizer.decode(tokenizer.encode(IMAGES)).shape == IMAGES.shape
    with pytest.raises(ValueError, match="tokenizer of Own cannot be saved"):
        tokenizer.save(tmp_path)


# Means of patches.


def test_means_of_separate_clusters_are_found_and_stay():
    centres = RANDOM.random((7, 4))
    patches = centres[RANDOM.permutation(np.repeat(np.arange(7), 12))]
    noisy = (patches + 1e-3 * RANDOM.standard_normal(patches.shape)).astype(np.float32)
    images = noisy.reshape(14, 2, 3, 2, 2).swapaxes(2, 3).reshape(14, 4, 6, 1)
    found = PatchKMeans.train(images, (2, 2), 7, jax.random.key(1), rounds=5)
    gaps = np.abs(np.asarray(found.codes)[:, None] - centres).max(-1)
    assert gaps.min(0).max() < 2e-3
    again = PatchKMeans.train(images, (2, 2), 7, jax.random.key(1), rounds=5)
    assert (again.codes == found.codes).all()
    assert found.distortion(images) < 2e-6


def test_more_rounds_and_more_codes_lower_the_error():
    def error(codes, rounds):
        key = jax.random.key(0)
        return PatchKMeans.train(IMAGES, (4, 4), codes, key, rounds=rounds).distortion(IMAGES)

    assert error(7, 9) < error(7, 0)
    assert error(11, 9) < error(7, 9)
    assert error(30, 1) == pytest.approx(0, abs=1e-12)  # one for each patch
    with pytest.raises(ValueError, match="E=31 codes of 30 patches"):
        error(31, 1)
