"""The formulas count what the model has and what JAX's programs multiply and keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxformer.analysis import cost, encoder_decoder_cost
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.transformer import ExpertsConfig, LatentConfig, TransformerConfig

B, S, T = 3, 5, 7
PLAIN = TransformerConfig(13, 22, 3, num_heads=6, num_kv_heads=2, head_dim=10, hidden=17)


def like(**changes):
    return dataclasses.replace(PLAIN, **changes)


BART = like(
    norm="layer",
    order="post",
    positions="learned",
    max_length=19,
    decoder_layers=2,
    head_bias=True,
    qkv_bias=True,
)
CONFIGS = {
    "bart": dataclasses.replace(BART, out_bias=True, embed_norm=True, final_norm=False),
    "t5": like(
        positions="buckets",
        decoder_vocab_size=11,
        layer_scale=0.1,
        tie_embeddings=False,
        qk_norm=True,
        order="sandwich",
    ),
    "again": dataclasses.replace(BART, remat=True, order="pre"),
    "windows": like(windows=(4, 4, 4), scan=True, gated=False),
    "latent": like(
        latent=LatentConfig(rank=11, query_rank=9, plain_dim=7, value_dim=5),
        experts=ExpertsConfig(6, 2, hidden=8, shared=4),
        out_bias=True,
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
SOURCE, TARGET = jnp.zeros((B, S), int), jnp.zeros((B, T), int)


def shapes(config):
    return jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0), SOURCE, TARGET)


def loss(config):
    def mean(variables, source, target):
        return jnp.square(EncoderDecoder(config).apply(variables, source, target)).mean()

    return mean


@every_config
def test_parameters_are_those_of_the_tree(name, size):
    config = CONFIGS[name]
    assert encoder_decoder_cost.parameters(config).total == size(shapes(config))


@every_config
def test_operations_are_those_of_the_products(name, multiplied):
    config = CONFIGS[name]
    forward = encoder_decoder_cost.forward(config, S, T, B).total
    assert forward == multiplied(EncoderDecoder(config).apply, shapes(config), SOURCE, TARGET)
    backward = encoder_decoder_cost.backward(config, S, T, B).total
    slope = jax.grad(loss(config))
    assert forward + backward == multiplied(slope, shapes(config), SOURCE, TARGET)


@every_config
@pytest.mark.parametrize("room", [3, 18, 19])
def test_reading_sources_and_a_step_multiply_what_is_counted(name, room, multiplied):
    config, tree = CONFIGS[name], shapes(CONFIGS[name])
    options = {"max_length": room, "dtype": jnp.bfloat16, "method": "begin"}
    begin = functools.partial(EncoderDecoder(config).apply, **options)
    assert encoder_decoder_cost.begin(config, S, B).total == multiplied(begin, tree, SOURCE)
    cache = jax.eval_shape(begin, tree, SOURCE)
    step = functools.partial(EncoderDecoder(config).apply, method="step")
    counted = multiplied(step, tree, TARGET[:, :1], cache)
    assert encoder_decoder_cost.step(config, S, room, B).total == counted
    kept = sum(2 * leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim > 2)
    assert encoder_decoder_cost.cache_bytes(config, S, room, B, dtype="bfloat16") == kept


# Of a token of each half what is no factor, as in the test of `cost`; the source enters the maps
# to keys and values of all blocks, but is kept once.
BESIDES = {
    "bart": (3 * 34 - 22, 2 * 34 + 13),
    "t5": (3 * 34 + 3 * (80 + 20) - 2 * 22, 3 * 34 + 3 * (80 + 60) + 11),
    "windows": (3 * 17 - 2 * 22, 3 * 17 + 13),
    "latent": (
        3 * (9 - 22) + 3 * (2 * (16 + 22) + 6 + 8 - 22) - 2 * 22,
        3 * (9 - 22) + 3 * (2 * (16 + 22) + 6 + 8 - 22) + 13,
    ),
}


@pytest.mark.parametrize("name", BESIDES)
def test_activations_hold_both_factors_of_every_product(name, factors):
    config = CONFIGS[name]
    leaves, tree = jax.tree.flatten(shapes(config))

    def apply(leaves, source, target):
        return EncoderDecoder(config).apply(tree.unflatten(leaves), source, target)

    found = encoder_decoder_cost.activation_bytes(config, S, T, B)
    of_source, of_target = BESIDES[name]
    counted = factors(apply, leaves, SOURCE, TARGET) + B * (S * of_source + T * of_target)
    assert found.total - found.norms == 4 * counted


def test_norms_keep_what_enters_them_once():
    def streams(**changes):
        found = encoder_decoder_cost.activation_bytes(like(**changes), S, T, B)
        return found.norms / (4 * B * 22)

    assert streams() == streams(order="post") == (3 * 2 + 1) * S + (3 * 3 + 1) * T
    assert streams(order="sandwich", final_norm=False) == 3 * 4 * S + 3 * 6 * T
    assert streams(layer_scale=0.1) == (3 * 4 + 1) * S + (3 * 6 + 1) * T
    assert streams(dropout=0.5) - streams() == 3 / 4 * (2 * S + 3 * T)


def test_jax_keeps_what_is_counted_and_at_most_3_times_as_much(residuals):
    source, target = jnp.zeros((2, 96), int), jnp.zeros((2, 128), int)
    for name in ("bart", "t5", "latent"):
        config = dataclasses.replace(CONFIGS[name], max_length=128)
        kept = residuals(loss(config), shapes(config), source, target)
        assert 1 < kept / encoder_decoder_cost.activation_bytes(config, 96, 128, 2).total < 3


def test_with_remat_jax_keeps_what_enters_each_block(residuals):
    def kept(layers):
        config = like(num_layers=layers, remat=True)
        return residuals(loss(config), shapes(config), SOURCE, TARGET)

    def counted(layers, **changes):
        config = like(num_layers=layers, **changes)
        return encoder_decoder_cost.activation_bytes(config, S, T, B).total

    streams = 4 * B * (S + T) * 22
    assert counted(3, remat=True) - counted(2, remat=True) == streams
    assert 0 <= kept(3) - kept(2) - streams < 4 * B * (S + T)  # and the numbers of places
    assert counted(1, remat=True) == counted(1)


def test_what_goes_with_one_model_alone_is_refused_for_the_others():
    with pytest.raises(NotImplementedError, match="decoder_layers=2"):
        cost.parameters(BART)
    for changes in ({"order": "parallel"}, {"token_types": 2}, {"head_transform": "gelu"}):
        with pytest.raises(NotImplementedError, match=next(iter(changes))):
            encoder_decoder_cost.parameters(like(**changes))
