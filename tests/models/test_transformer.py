"""The config that the skeletons share: every field is read, and nonsense is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder import Encoder
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig
from jaxformer.ops.rope import Rope

CONFIG = TransformerConfig(7, 6, 2, num_heads=4, num_kv_heads=2, head_dim=2, hidden=5)
TOKENS = jnp.zeros((1, 3), int)
CHANGES = {
    "vocab_size": 8,
    "width": 5,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 1,
    "head_dim": 4,
    "hidden": 3,
    "qk_norm": True,
    "dropout": 0.1,
    "drop_path": 0.1,
    "layer_scale": 0.1,
    "tie_embeddings": False,
    "scan": True,
    "remat": True,
    "distinct_layers": 1,
    "embed_width": 3,
    "norm": "layer",
    "epsilon": 1e-3,
    "order": "post",
    "first_norm": False,
    "final_norm": False,
    "positions": "none",
    "max_length": 9,
    "position_offset": 2,
    "pad_token": 0,
    "token_types": 2,
    "rope": Rope(interleaved=True),
    "local_rope": Rope(interleaved=True),
    "windows": (2, None),
    "ahead": 1,
    "activation": "gelu",
    "gated": False,
    "qkv_bias": True,
    "key_bias": False,
    "out_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "head_transform": "relu",
    "pooler": True,
    "scale": 0.3,
    "softcap": 2.0,
    "logit_softcap": 2.0,
    "sinks": True,
    "embed_scale": 2.0,
    "embed_norm": True,
    "num_buckets": 4,
    "max_distance": 20,
    "logit_scale": 0.5,
    "decoder_layers": 1,
    "decoder_vocab_size": 9,
    "experts": ExpertsConfig(2, 1, 3),
    "latent": LatentConfig(4, None, 3, 5),
}
# What must be chosen too for a field to matter.
WITH = {
    "key_bias": {"qkv_bias": True},
    "max_length": {"positions": "learned", "max_length": 8},
    "position_offset": {"positions": "learned", "max_length": 8},
    "pad_token": {"positions": "learned", "max_length": 8, "position_offset": 1},
    "embed_width": {"head_transform": "gelu"},
    "ahead": {"windows": (2, None)},
    "local_rope": {"windows": (2, None)},
    "num_buckets": {"positions": "buckets"},
    "max_distance": {"positions": "buckets"},
}


OF_ENCODERS = ("embed_width", "pad_token", "token_types", "ahead", "head_transform")
OF_BOTH_HALVES = ("decoder_layers", "decoder_vocab_size")


@pytest.fixture(scope="module")
def plain(program):
    return program(Decoder(CONFIG), TOKENS)


def test_equal_configs_give_the_same_program(program, plain):
    assert program(Decoder(dataclasses.replace(CONFIG)), TOKENS) == plain


FIELDS = [field.name for field in dataclasses.fields(CONFIG)]


@pytest.mark.parametrize("field", sorted({*FIELDS} - {*OF_ENCODERS, *OF_BOTH_HALVES, "pooler"}))
def test_every_field_is_read(program, plain, field):
    if field in WITH:
        plain = program(Decoder(dataclasses.replace(CONFIG, **WITH[field])), TOKENS)
    changed = dataclasses.replace(CONFIG, **WITH.get(field, {}) | {field: CHANGES[field]})
    assert program(Decoder(changed), TOKENS) != plain


@pytest.mark.parametrize("field", OF_ENCODERS)
def test_every_field_of_encoders_is_read_by_them_and_refused_by_decoders(program, field):
    plain = dataclasses.replace(CONFIG, **WITH.get(field, {}))
    changed = dataclasses.replace(plain, **{field: CHANGES[field]})
    one, other = (program(Encoder(x), TOKENS, method="logits") for x in (plain, changed))
    assert one != other
    with pytest.raises(NotImplementedError, match=f"a decoder knows no {field}"):
        program(Decoder(dataclasses.replace(CONFIG, **{field: CHANGES[field]})), TOKENS)


@pytest.mark.parametrize("field", OF_BOTH_HALVES)
def test_every_field_of_encoder_decoders_is_read_by_them_and_refused_by_others(program, field):
    changed = dataclasses.replace(CONFIG, **{field: CHANGES[field]})
    one, other = (program(EncoderDecoder(x), TOKENS, TOKENS) for x in (CONFIG, changed))
    assert one != other
    for kind, who in ((Decoder, "a decoder"), (Encoder, "an encoder")):
        with pytest.raises(NotImplementedError, match=f"{who} knows no {field}"):
            program(kind(changed), TOKENS)


@pytest.mark.parametrize("positions", ["buckets", "sinusoidal", "sinusoidal_halves"])
def test_each_kind_of_positions_is_one_of_all_three_skeletons(program, positions):
    changed = dataclasses.replace(CONFIG, positions=positions)
    none = dataclasses.replace(CONFIG, positions="none")
    for kind, count in ((Decoder, 1), (Encoder, 1), (EncoderDecoder, 2)):
        one, other = (program(kind(x), *[TOKENS] * count) for x in (none, changed))
        assert one != other


@pytest.mark.parametrize(
    "other", [{"positions": "buckets"}, {"decoder_layers": 1}, {"latent": CHANGES["latent"]}]
)
def test_windows_go_with_neither_buckets_nor_two_depths_nor_latents(other):
    with pytest.raises(ValueError, match="windows go with neither"):
        dataclasses.replace(CONFIG, windows=(2, 2), **other)


def test_a_pooler_is_of_encoders(program):
    changed = dataclasses.replace(CONFIG, pooler=True)
    assert "tanh" in program(Encoder(changed), TOKENS, method="pooled")
    with pytest.raises(ValueError, match="no pooler"):
        program(Encoder(CONFIG), TOKENS, method="pooled")
    with pytest.raises(NotImplementedError, match="a decoder knows no pooler"):
        program(Decoder(changed), TOKENS)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_have_a_bias_in_all_three_skeletons(tied):
    config = dataclasses.replace(CONFIG, head_bias=True, tie_embeddings=tied)
    for kind, count, method in (
        (Decoder, 1, "__call__"),
        (Encoder, 1, "logits"),
        (EncoderDecoder, 2, "__call__"),
    ):
        model, zeros = kind(config), [TOKENS] * count
        variables = jax.jit(functools.partial(model.init, method=method))(jax.random.key(0), *zeros)
        params = variables["params"]
        bias = params["head_bias"] if tied else params["head"]["bias"]
        moved = {"head_bias": bias + 1} if tied else {"head": params["head"] | {"bias": bias + 1}}
        one, other = (
            model.apply({"params": x}, *zeros, method=method) for x in (params, params | moved)
        )
        np.testing.assert_allclose(other, one + 1, atol=1e-5)


def test_another_first_value_of_the_layer_scale_is_another_program(program):
    one, other = (dataclasses.replace(CONFIG, layer_scale=scale) for scale in (0.1, 0.2))
    assert program(Decoder(one), TOKENS) != program(Decoder(other), TOKENS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be positive, got 0"),
        ("num_layers", 0, "num_layers must be positive, got 0"),
        ("num_kv_heads", 0, "num_kv_heads must be positive, got 0"),
        ("num_kv_heads", 3, "N=4 is not a multiple of K=3"),
        ("head_dim", 3, "H=3"),
        ("head_dim", 0, "H=0"),
        ("dropout", 1.0, r"dropout must lie in \[0, 1\), got 1.0"),
        ("drop_path", -0.1, r"drop_path must lie in \[0, 1\), got -0.1"),
    ],
)
def test_sizes_that_cannot_be_are_named_in_the_error(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_tiny_size_has_the_vocabulary_asked_for():
    assert TransformerConfig.tiny(11).vocab_size == 11
