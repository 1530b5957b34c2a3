"""The formulas count what the models have and what JAX's programs multiply and keep."""

import dataclasses
import functools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analysis import cost
from jaxformer.models.decoder import Decoder
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import (
    NORMS,
    ORDERS,
    POSITIONS,
    ExpertsConfig,
    LatentConfig,
    TransformerConfig,
)
from jaxformer.ops import losses
from jaxformer.training import optimizers

B, T = 3, 7
LLAMA = TransformerConfig(13, 22, 3, num_heads=6, num_kv_heads=2, head_dim=10, hidden=17)


def like(**changes):
    return dataclasses.replace(LLAMA, **changes)


CONFIGS = {
    "llama": LLAMA,
    "gpt2": like(
        num_kv_heads=6,
        norm="layer",
        positions="learned",
        max_length=19,
        position_offset=2,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    "gemma": like(
        norm="rms_plus_one",
        order="sandwich",
        windows=(4, None, 2),
        softcap=5.0,
        logit_softcap=3.0,
        sinks=True,
        embed_scale=2.0,
        gated=True,
        mlp_bias=True,
    ),
    "neox": like(order="parallel", norm="layer_without_bias", qk_norm=True, tie_embeddings=False),
    "olmo": like(order="branch", qk_norm="whole", activation="xielu", gated=False),
    "post": like(order="post", norm="layer", scan=True, positions="sinusoidal", final_norm=False),
    "deepseek": like(
        experts=ExpertsConfig(5, 2, hidden=6, router="sigmoid", use_bias=True, shared=4, first=1),
        tie_embeddings=False,
        first_norm=False,
    ),
    "gptj": like(
        experts=ExpertsConfig(5, 2, hidden=6, shared=4),
        order="parallel",
        positions="buckets",
        num_buckets=9,
        logit_scale=0.5,
    ),
    "albert": like(distinct_layers=1, scan=True, norm="layer", positions="sinusoidal_halves"),
    "latent": like(
        latent=LatentConfig(rank=11, query_rank=None, plain_dim=7, value_dim=5),
        order="parallel",
        out_bias=True,
        scan=True,
        qk_norm=True,
        qkv_bias=True,
        sinks=True,
        softcap=5.0,
    ),
    "deepseek_v3": like(
        latent=LatentConfig(rank=11, query_rank=9, plain_dim=7, value_dim=5),
        experts=ExpertsConfig(6, 2, 8, router="sigmoid", groups=3, top_groups=2, shared=4, first=1),
        tie_embeddings=False,
    ),
    "bloom": like(
        positions="alibi",
        embed_norm=True,
        norm="layer",
        layer_scale=0.1,
        tie_embeddings=False,
        head_bias=True,
        scan=True,
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
CHANGES = {
    "vocab_size": 14,
    "width": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 3,
    "head_dim": 8,
    "hidden": 18,
    "qk_norm": True,
    "layer_scale": 0.5,
    "tie_embeddings": False,
    "norm": "layer",
    "order": "sandwich",
    "final_norm": False,
    "positions": "none",
    "gated": False,
    "qkv_bias": True,
    "key_bias": False,
    "out_bias": True,
    "mlp_bias": True,
    "sinks": True,
    "embed_norm": True,
    "drop_path": 0.1,
    "scan": True,
    "epsilon": 0.1,
    "scale": 0.1,
    "logit_softcap": 2.0,
    "embed_scale": 3.0,
    "logit_scale": 3.0,
    "max_distance": 40,
    "first_norm": False,
    "distinct_layers": 1,
    "experts": ExpertsConfig(5, 2, hidden=6),
    "latent": LatentConfig(rank=11, query_rank=9, plain_dim=7, value_dim=5),
}


def shapes(config):
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)


def loss(config):
    def mean(variables, tokens, train=False):
        rngs = {"dropout": jax.random.key(0)}
        logits = Decoder(config).apply(variables, tokens, train=train, rngs=rngs)
        return losses.cross_entropy(logits, tokens).mean()

    return mean


TOKENS = jnp.zeros((B, T), int)


@every_config
def test_parameters_are_those_of_the_tree_part_by_part(name, size):
    config = CONFIGS[name]
    found, tree = cost.parameters(config), shapes(config)["params"]
    blocks = {"projections": 0, "mlp": 0, "norms": 0}
    for path, leaf in jax.tree.leaves_with_path(tree["blocks"]):
        keys = [key.key for key in path]
        inside = "inner" in keys and not any("norm" in key for key in keys)
        part = ("projections" if "attention" in keys else "mlp") if inside else "norms"
        blocks[part] += math.prod(leaf.shape)
    assert found.projections == blocks["projections"]
    assert found.mlp == blocks["mlp"]
    ends = {key: leaves for key, leaves in tree.items() if key.startswith("norm")}
    assert found.norms == blocks["norms"] + size(ends)
    tables = {key: leaves for key, leaves in tree.items() if key in ("embed", "places", "bias")}
    assert found.embedding == size(tables)
    assert found.head == size(tree.get("head", {}))
    assert found.total == size(tree)


@every_config
def test_forward_operations_are_those_of_the_products(name, multiplied):
    config = CONFIGS[name]
    counted = multiplied(Decoder(config).apply, shapes(config), TOKENS)
    assert cost.forward(config, T, B).total == counted


@every_config
def test_backward_operations_are_those_of_the_products(name, multiplied):
    config = CONFIGS[name]
    counted = multiplied(jax.grad(loss(config)), shapes(config), TOKENS)
    assert cost.forward(config, T, B).total + cost.backward(config, T, B).total == counted


@every_config
def test_remat_computes_again_what_is_counted(name, multiplied):
    config = dataclasses.replace(CONFIGS[name], remat=True)
    counted = multiplied(jax.grad(loss(config)), shapes(config), TOKENS)
    assert cost.forward(config, T, B).total + cost.backward(config, T, B).total == counted


@every_config
@pytest.mark.parametrize("room", [3, 18, 19])
def test_a_step_with_a_cache_multiplies_what_is_counted(name, room, multiplied):
    config = CONFIGS[name]
    cache = Decoder(config).empty_cache(B, room, jnp.bfloat16)
    counted = multiplied(Decoder(config).apply, shapes(config), TOKENS[:, :1], cache)
    assert cost.decode(config, room, B).total == counted
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(cache) if leaf.ndim > 2)
    assert cost.cache_bytes(config, room, B, dtype="bfloat16") == kept


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_compiled_program_multiplies_no_more_and_no_less(name):
    config = CONFIGS[name]
    text = jax.jit(jax.grad(loss(config))).lower(shapes(config), TOKENS).compile().as_text()
    array = r"\w+\[([\d,]*)\]\S*"
    product = rf"= {array} dot\((?:{array} )?%?([\w.-]+), .*lhs_contracting_dims={{([\d,]*)}}"
    sizes = dict(re.findall(rf"%?([\w.-]+) = {array}", text))
    counted = 0
    for result, _, left, axes in re.findall(product, text):
        dims, summed = sizes[left].split(","), axes.split(",")
        depth = math.prod(int(dims[int(axis)]) for axis in summed)
        counted += 2 * depth * math.prod(int(n) for n in result.split(","))
    assert counted == cost.forward(config, T, B).total + cost.backward(config, T, B).total


def test_causal_operations_are_those_of_the_pairs_that_see_each_other():
    config = CONFIGS["gemma"]
    back = np.arange(T)[:, None] - np.arange(T)
    pairs = sum(((back >= 0) & (back < (window or T))).sum() for window in config.windows)
    dense, causal = cost.forward(config, T, B), cost.forward(config, T, B, causal=True)
    assert causal.scores == B * 4 * 60 * pairs
    assert dataclasses.replace(causal, scores=0) == dataclasses.replace(dense, scores=0)
    assert cost.forward(LLAMA, T, causal=True).scores * 2 * T == (T + 1) * (
        cost.forward(LLAMA, T).scores
    )


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_exercise_of_the_lecture(heads):
    """4 d² weights whatever the number of heads; 8 n d² + 4 n² d operations; as many at n = 2 d."""
    n, d = 5, 24
    config = TransformerConfig(13, d, 1, heads, heads, d // heads, hidden=4 * d, positions="none")
    assert cost.parameters(config).attention == 4 * d**2
    assert cost.forward(config, n).attention == 8 * n * d**2 + 4 * n**2 * d
    assert cost.crossover(config) == 2 * d
    at = cost.forward(config, 2 * d)
    assert at.projections == at.scores


def test_published_sizes():
    gpt2 = TransformerConfig(
        50257, 768, 12, 12, 12, 64, 3072, norm="layer", positions="learned", max_length=1024,
        gated=False, activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip
    assert cost.parameters(gpt2).total == 124_439_808
    llama = TransformerConfig(128256, 4096, 32, 32, 8, 128, 14336, tie_embeddings=False)
    assert cost.parameters(llama).total == 8_030_261_248
    assert cost.cache_bytes(llama, 8192, dtype="bfloat16") == 2**30  # 128 KiB a token


def test_adamws_bytes_are_those_of_its_state(size):
    variables = shapes(LLAMA)
    state = jax.eval_shape(optimizers.adamw(0.1).init, variables)
    moments = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(state) if x.ndim)
    number = size(variables)
    found = {"parameters": 4 * number, "gradients": 4 * number, "moments": moments}
    assert cost.adamw_bytes(number) == found
    assert cost.adamw_bytes(number, dtype="bfloat16") == {x: y // 2 for x, y in found.items()}


# Of a layer and token what enters norms inside attention, less what enters two products.
ATTENTION = {"neox": 80, "olmo": 80, "latent": 11 - 11 - 22, "deepseek_v3": 9 + 11 - 11 - 22}
# Of all layers what enters activations, is weighted, or is a router's logit; less likewise.
MLPS = {
    "gpt2": 3 * 17,
    "olmo": 3 * 17,
    "deepseek": 34 + 2 * (2 * (12 + 22) + 5 + 8 - 22),
    "gptj": 3 * (2 * (12 + 22) + 5 + 8 - 22),
    "deepseek_v3": 34 + 2 * (2 * (16 + 22) + 6 + 8 - 22),
}


@every_config
def test_activations_hold_both_factors_of_every_product(name, factors):
    config = CONFIGS[name]
    leaves, tree = jax.tree.flatten(shapes(config))

    def apply(leaves, tokens):
        return Decoder(config).apply(tree.unflatten(leaves), tokens)

    rest = 3 * ATTENTION.get(name, 0) + MLPS.get(name, 3 * 34) + 13
    capped = 3 * 6 * B * T**2 * (name == "gemma")
    found = cost.activation_bytes(config, T, B)
    assert found.total - found.norms == 4 * (factors(apply, leaves, TOKENS) + B * T * rest + capped)


def test_router_logits_stay_in_float32():
    found = [cost.activation_bytes(CONFIGS["gptj"], T, B, dtype=dtype).mlp for dtype in cost.BYTES]
    assert found == [
        B * T * 3 * (size * (22 + 2 * (22 + 18 + 22) + 12) + 20) for size in (4, 2, 2, 1)
    ]


@pytest.mark.parametrize("scan", [False, True])
def test_jax_keeps_what_is_counted_and_at_most_3_times_as_much(scan, residuals):
    names = ("llama", "gpt2", "post", "latent", *(() if scan else ("deepseek_v3", "gptj")))
    for name in names:
        config = dataclasses.replace(CONFIGS[name], scan=scan, max_length=256)
        kept = residuals(loss(config), shapes(config), jnp.zeros((2, 128), int))
        assert 1 < kept / cost.activation_bytes(config, 128, 2).total < 3


def test_with_remat_jax_keeps_what_enters_each_block(residuals):
    def kept(layers):
        config = like(num_layers=layers, remat=True)
        return residuals(loss(config), shapes(config), TOKENS)

    def counted(layers):
        return cost.activation_bytes(like(num_layers=layers, remat=True), T, B).total

    assert counted(3) - counted(2) == 4 * B * T * 22
    assert 0 <= kept(3) - kept(2) - 4 * B * T * 22 < 4 * B * T  # and the numbers of T places
    assert counted(1) == cost.activation_bytes(like(num_layers=1), T, B).total

    first, mixed = ExpertsConfig(5, 2, hidden=6), ExpertsConfig(5, 2, hidden=6, first=1)
    found = [cost.activation_bytes(like(experts=x, remat=True), T, B) for x in (first, mixed)]
    assert found[0] == found[1]  # the largest block is inside, whichever it is


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [({}, 1.2, 1.9), ({"scan": True}, 1.6, 2.5), ({"scan": True, "remat": True}, 1.0, 1.7)],
)
def test_a_compiled_program_allots_a_little_more_than_is_counted(changes, least, most):
    config = TransformerConfig(256, 64, 4, 4, 4, 16, 192, **changes)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    program = jax.jit(jax.grad(loss(config))).lower(shapes(config), tokens).compile()
    allotted = program.memory_analysis().temp_size_in_bytes
    assert least < allotted / cost.activation_bytes(config, 128, 8).total < most


BERT = like(norm="layer", order="post", positions="learned", max_length=9, token_types=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_bias": True},
        {"head_transform": "gelu"},
        {"head_transform": "relu", "mlp_bias": True},
    ],
)
def test_an_encoder_with_its_logits_costs_what_a_decoder_does(changes, size, multiplied, factors):
    config, model = dataclasses.replace(BERT, **changes), Encoder
    init = functools.partial(model(config).init, method="logits")
    tree = jax.eval_shape(init, jax.random.key(0), TOKENS)
    assert cost.parameters(config).total == size(tree)
    logits = functools.partial(model(config).apply, method="logits")
    forward = multiplied(logits, tree, TOKENS)
    assert cost.forward(config, T, B).total == forward
    slope = jax.grad(lambda tree: jnp.square(logits(tree, TOKENS)).sum())
    assert forward + cost.backward(config, T, B).total == multiplied(slope, tree)

    leaves, treedef = jax.tree.flatten(tree)

    def apply(leaves, tokens):
        return logits(treedef.unflatten(leaves), tokens)

    found = cost.activation_bytes(config, T, B)
    rest = 3 * 34 + 13 + 22 * ("head_transform" in changes)
    assert found.total - found.norms == 4 * (factors(apply, leaves, TOKENS) + B * T * rest)


def test_norms_keep_what_enters_them_once():
    def streams(**changes):
        return cost.activation_bytes(like(**changes), T, B).norms / (4 * B * T * 22)

    assert streams() == streams(order="branch") == streams(order="post") == 3 * 2 + 1
    assert streams(order="sandwich", embed_norm=True) == 3 * 4 + 2
    assert streams(order="parallel", final_norm=False) == 3  # one stream enters both norms
    assert streams(first_norm=False, layer_scale=0.1) == 3 * 4


def test_dropout_keeps_its_masks():
    found = cost.activation_bytes(like(dropout=0.1), T, B).total
    assert found - cost.activation_bytes(LLAMA, T, B).total == 3 * 2 * B * T * 22


def test_every_field_is_counted_or_without_effect_or_refused():
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    assert not cost.COUNTED & cost.WITHOUT_EFFECT
    assert set(fields) >= cost.COUNTED | cost.WITHOUT_EFFECT
    for name in set(fields) - cost.COUNTED - cost.WITHOUT_EFFECT:
        config = dataclasses.replace(LLAMA)
        object.__setattr__(config, name, "another value")
        for function in (cost.check, cost.parameters, cost.crossover):
            with pytest.raises(NotImplementedError, match=name):
                function(config)


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_field_changes_formula_and_model_alike(name, size, multiplied):
    config = like(**{name: CHANGES[name]})
    tree = shapes(config)
    assert cost.parameters(config).total == size(tree)
    assert cost.forward(config, T, B).total == multiplied(Decoder(config).apply, tree, TOKENS)
    assert name in cost.COUNTED or cost.parameters(config) == cost.parameters(LLAMA)
    assert name in cost.COUNTED or cost.forward(config, T) == cost.forward(LLAMA, T)


def test_an_unknown_field_is_refused_by_name():
    @dataclasses.dataclass(frozen=True)
    class Wider(TransformerConfig):
        memories: int = 0

    wider = Wider(**{field.name: getattr(LLAMA, field.name) for field in dataclasses.fields(LLAMA)})
    assert cost.parameters(wider) == cost.parameters(LLAMA)
    with pytest.raises(NotImplementedError, match="memories=8"):
        cost.parameters(dataclasses.replace(wider, memories=8))


def test_choices_are_counted_or_refused(size):
    for name, values in (("norm", NORMS), ("order", ORDERS), ("positions", POSITIONS)):
        assert set(values) >= set(cost.CHOICES[name])
        for value in values:
            config = like(**{name: value}, max_length=9)
            if value in cost.CHOICES[name]:
                assert cost.parameters(config).total == size(shapes(config))
                continue
            with pytest.raises(NotImplementedError, match=f"{name}={value!r}"):
                cost.parameters(config)


def test_the_formulas_load_no_jax():
    told = "import sys, jaxformer.analysis.cost; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
