"""Folders in and out: what is refused, and that nothing is half-written; no torch needed."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxformer import interop
from jaxformer.interop import tensors
from jaxformer.models.decoder import Decoder
from jaxformer.models.transformer import TransformerConfig

CONFIG = TransformerConfig(
    11, 8, 2, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6, epsilon=1e-5, max_length=32
)


@pytest.fixture(scope="module")
def params(draw):
    return draw(Decoder(CONFIG), jnp.zeros((1, 1), int))


@pytest.fixture
def folder(params, tmp_path):
    interop.save(Decoder(CONFIG), params, tmp_path / "model")
    return tmp_path / "model"


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder, edit):
    path = folder / "model.safetensors"
    found = load_file(path)
    edit(found)
    save_file(found, path)


def test_a_round_trip_is_bit_identical_in_one_file_or_many(params, tmp_path):
    for name, size in (("one", 1 << 30), ("many", 500)):
        interop.save(Decoder(CONFIG), params, tmp_path / name, shard_bytes=size)
        model, again = interop.load(tmp_path / name)
        assert model == Decoder(CONFIG)
        jax.tree.map(np.testing.assert_array_equal, params, again)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3


def test_narrow_parameters_stay_as_they_are(params, tmp_path):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    interop.save(Decoder(CONFIG), narrow, tmp_path / "narrow")
    _, again = interop.load(tmp_path / "narrow")
    jax.tree.map(np.testing.assert_array_equal, narrow, again)
    _, wide = interop.load(tmp_path / "narrow", dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_parameters_go_straight_to_their_devices(folder, params):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def place(path, shape):
        axes = [None] * len(shape)
        if path.endswith("kernel"):
            axes[-1] = "x"
        return NamedSharding(mesh, PartitionSpec(*axes))

    _, found = interop.load(folder, sharding=place)
    jax.tree.map(np.testing.assert_array_equal, params, found)
    kernel = found["params"]["blocks"]["layers_0"]["mlp"]["inner"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "x")
    assert {x.data.shape for x in kernel.addressable_shards} == {(8, 6)}


def test_one_parameter_at_a_time_is_read(folder, monkeypatch):
    alive, most = [0], [0]
    read = tensors.Tensors.read

    def counted(self, name):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return read(self, name)

    put = jax.device_put

    def placed(*args):
        alive[0] = 0
        return put(*args)

    monkeypatch.setattr(tensors.Tensors, "read", counted)
    monkeypatch.setattr(jax, "device_put", placed)
    interop.load(folder)
    assert most[0] == 3  # queries, keys and values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "rwkv"}, "model_type='rwkv' is not known"),
        ({"sliding_chunk": 3}, "not supported: sliding_chunk=3"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_theta": 1.0, "wobble": 2}}, "wobble=2"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 1}, "surplus: .*layers.1"),
        ({"num_hidden_layers": 3}, "missing: .*layers.2"),
        ({"intermediate_size": 7}, "gate_proj.weight has 6 outputs, expected 7"),
        ({"vocab_size": 12}, r"embed_tokens.weight makes \(11, 8\), not \(12, 8\)"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder, settings, message):
    change(folder, **settings)
    with pytest.raises(ValueError, match=message):
        interop.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "model_type is missing")],
)
def test_a_config_that_is_none_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config.json.*{message}"):
        interop.load(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        interop.load(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.* are pickles"):
        interop.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        interop.load(folder)


def header(length, text):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x07",
        header(1 << 62, b"{}"),
        header(2, b"{"),
        header(4, b"null"),
        header(9, b'{"a": {}}'),
        header(62, b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,99999999]}}'[:62]),
    ],
)
def test_a_broken_or_hostile_header_is_named(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors is no sound safetensors file"):
        interop.load(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors is no sound safetensors file"):
        interop.load(folder)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../other.safetensors"}}', "{}", "[", '{"weight_map": 3}']
)
def test_an_index_that_is_none_or_leads_outside_is_named(folder, index):
    (folder / tensors.INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"index.json"):
        interop.load(folder)


def test_weights_that_are_no_numbers_are_named(folder):
    rewrite(folder, lambda x: x["model.norm.weight"].fill(np.nan))
    with pytest.raises(ValueError, match=r"model.safetensors: model.norm.weight holds NaN"):
        interop.load(folder)


def test_a_head_beside_tied_embeddings_must_be_the_same(folder):
    rewrite(folder, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].copy()}))
    interop.load(folder)
    rewrite(folder, lambda x: x.update({"lm_head.weight": 2 * x["model.embed_tokens.weight"]}))
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        interop.load(folder)


def test_names_without_the_prefix_are_a_bare_model(folder, params):
    def bare(found):
        for name in list(found):
            found[name.removeprefix("model.")] = found.pop(name)

    rewrite(folder, bare)
    jax.tree.map(np.testing.assert_array_equal, params, interop.load(folder)[1])


def test_nothing_is_written_over_or_left_half_done(params, folder, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError):
        interop.save(Decoder(CONFIG), params, folder)
    monkeypatch.setattr(tensors, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interop.save(Decoder(CONFIG), params, tmp_path / "other")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_what_no_architecture_can_say_is_refused(params, tmp_path):
    odd = TransformerConfig(
        11, 8, 2, num_heads=2, num_kv_heads=1, head_dim=4, hidden=6, order="post", epsilon=1e-5
    )
    with pytest.raises(ValueError, match="cannot say"):
        interop.save(Decoder(odd), params, tmp_path / "odd")
    short = {"params": {**params["params"]}}
    del short["params"]["norm"]
    with pytest.raises(ValueError, match=r"norm/scale"):
        interop.save(Decoder(CONFIG), short, tmp_path / "short")
