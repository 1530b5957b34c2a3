"""The image GPT is a distribution over pictures, and no cell of it sees its future."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxformer import testing
from jaxformer.layers.stack import stack_parameters
from jaxformer.models import image_gpt
from jaxformer.models.image_gpt import ImageGPT, ImageGPTConfig
from jaxformer.ops import linear
from jaxformer.ops.attention import blocked

CONFIG = ImageGPTConfig(side=6, num_classes=3, width=8, num_layers=2, num_heads=2, hidden=11)
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.integers(0, 2, (5, 6, 6)))
CELLS = image_gpt.to_tokens(IMAGES, CONFIG)
TOKENS = image_gpt.with_class(jnp.array([0, 1, 2, 0, 1]), CELLS, CONFIG)


@pytest.fixture(scope="module")
def variables(draw):
    return draw(ImageGPT(CONFIG), TOKENS)


@pytest.fixture(scope="module")
def apply(variables):
    return jax.jit(lambda tokens: ImageGPT(CONFIG).apply(variables, tokens))


def scanned(variables):
    parameters = variables["params"]
    return {"params": parameters | {"blocks": stack_parameters(parameters["blocks"])}}


def test_the_probabilities_of_all_pictures_sum_to_one(draw):
    config = ImageGPTConfig(side=4, num_classes=2, width=8, num_layers=1, num_heads=2, hidden=8)
    everything = np.indices((16,) * 4, dtype=np.int32).reshape(4, 8, -1)
    model = ImageGPT(config)

    @jax.jit
    def likelihoods(variables, cells):
        tokens = image_gpt.with_class(jnp.ones(len(cells), int), cells, config)
        return image_gpt.log_likelihood(model.apply(variables, tokens), cells)

    variables = draw(model, jnp.zeros((1, 4), int))
    parts = [likelihoods(variables, jnp.asarray(everything[:, i].T)) for i in range(8)]
    scores = np.concatenate(parts).astype(np.float64)
    assert scores.shape == (65_536,)
    assert np.ptp(scores) > 1  # some pictures are likelier than others
    assert abs(scipy.special.logsumexp(scores)) <= 1e-5


def test_no_cell_sees_its_future(variables):
    # Each cell has a symbol of its own, so the rows of the table are what the sequence holds.
    parameters, length = variables["params"], CONFIG.cells
    tokens = jnp.concatenate([jnp.array([CONFIG.vocab_size]), jnp.arange(length - 1)])[None]
    table = parameters["neighbours"]["table"]
    count, width = table.shape[0], CONFIG.width

    def logits_of(rows):
        cells = rows[1:].reshape(length - 1, count, width).swapaxes(0, 1)
        moved = parameters | {
            "classes": {"table": rows[:1, :width]},
            "neighbours": {"table": table.at[:, : length - 1].set(cells)},
        }
        return ImageGPT(dataclasses.replace(CONFIG, num_classes=1)).apply(
            {"params": moved}, tokens
        )[0]

    rows = RANDOM.standard_normal((length, count * width))
    testing.assert_causal(logits_of, jnp.asarray(rows, jnp.float32))


@pytest.mark.parametrize("scan", [False, True])
def test_cached_logits_are_the_uncached_ones(variables, apply, scan):
    model = ImageGPT(dataclasses.replace(CONFIG, scan=scan))
    variables = scanned(variables) if scan else variables
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache))
    cache, found = model.empty_cache(len(TOKENS)), []
    for part in jnp.split(TOKENS, [4, 5, 6, 7, 8], axis=1):
        new, cache = step(part, cache)
        found.append(new)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), apply(TOKENS), atol=1e-5)
    assert (cache.tokens == TOKENS).all()
    more, _ = step(TOKENS[:, :1], cache)
    assert np.isnan(more).all()  # the picture is full


def test_the_last_logits_are_those_of_the_last_token(variables, apply):
    model, whole = ImageGPT(CONFIG), apply(TOKENS)[:, -1:]
    run = jax.jit(functools.partial(model.apply, last=True))
    np.testing.assert_allclose(run(variables, TOKENS), whole, atol=1e-5)
    found, _ = run(variables, TOKENS, model.empty_cache(len(TOKENS)))
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_the_fast_form_is_the_plain_one(draw):
    config = dataclasses.replace(CONFIG, num_layers=1)
    plain = ImageGPT(config)
    fast = ImageGPT(config, blocked.attend_causal, linear.project_input_first)

    @jax.jit
    def both(variables):
        def loss(variables, model):
            return -image_gpt.log_likelihood(model.apply(variables, TOKENS), CELLS).mean()

        return [jax.value_and_grad(loss)(variables, model) for model in (fast, plain)]

    (found, gradients), (expected, others) = both(draw(plain, TOKENS))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_fast_form_refuses_a_cache(variables):
    model = ImageGPT(CONFIG, blocked.attend_causal)
    with pytest.raises(NotImplementedError, match="causal"):
        jax.eval_shape(model.apply, variables, TOKENS, model.empty_cache(len(TOKENS)))


def test_at_first_every_symbol_is_as_likely_as_any_other():
    model = ImageGPT(dataclasses.replace(CONFIG, num_layers=1))
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0, impl="rbg"), TOKENS)
    assert logits.dtype == jnp.float32
    each = image_gpt.log_likelihood(logits, CELLS)
    np.testing.assert_allclose(each, -CONFIG.cells * np.log(CONFIG.vocab_size), rtol=1e-6)


def test_narrow_parameters_give_wide_logits():
    model = ImageGPT(CONFIG)

    def step(key, cache):
        variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.init(key, TOKENS))
        return model.apply(variables, TOKENS, cache)

    logits, cache = jax.eval_shape(step, jax.random.key(0), model.empty_cache(5, jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert cache.blocks[0].keys.dtype == jnp.bfloat16


def test_a_class_or_a_cell_that_is_none_gives_nan(apply):
    for column, token in ((0, 15), (0, 16 + 3), (2, 16), (2, -1)):
        assert np.isnan(apply(TOKENS.at[1, column].set(token))[1, column:]).all()


CHANGES = {
    "side": 8,
    "patch": 3,
    "num_classes": 4,
    "width": 6,
    "num_layers": 3,
    "num_heads": 4,
    "hidden": 7,
    "neighbours": ((0, -1),),
    "dropout": 0.1,
    "scan": True,
    "remat": True,
}


@pytest.fixture(scope="module")
def plain(program):
    return program(ImageGPT(CONFIG), TOKENS[:1, :4])


def test_equal_configs_give_the_same_program(program, plain):
    assert program(ImageGPT(dataclasses.replace(CONFIG)), TOKENS[:1, :4]) == plain


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CONFIG)])
def test_every_field_is_read(program, plain, field):
    changed = dataclasses.replace(CONFIG, **{field: CHANGES[field]})
    assert program(ImageGPT(changed), TOKENS[:1, :4]) != plain


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch", 4, "side=6 is not a multiple of patch=4"),
        ("patch", 0, "patch must be positive, got 0"),
        ("num_heads", 3, "D=8 is not a multiple of N=3"),
        ("num_heads", 0, "num_heads must be positive, got 0"),
        ("dropout", 1.0, "got 1.0"),
    ],
)
def test_sizes_that_cannot_be_are_named_in_the_error(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_published_sizes_have_the_parameters_they_say():
    for config, millions in ((ImageGPTConfig.mnist(), 0.2), (ImageGPTConfig.mnist_large(), 18)):
        tokens = jnp.zeros((1, config.cells), int)
        shapes = jax.eval_shape(ImageGPT(config).init, jax.random.key(0), tokens)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert count / 1e6 == pytest.approx(millions, rel=0.15)


def test_pictures_and_cells_are_each_others_exact_inverse():
    assert (image_gpt.to_images(CELLS, CONFIG) == IMAGES).all()
    assert (image_gpt.to_tokens(IMAGES.astype(bool), CONFIG) == CELLS).all()
    cells = jnp.arange(18).reshape(2, 9) % 16
    assert (image_gpt.to_tokens(image_gpt.to_images(cells, CONFIG), CONFIG) == cells).all()


def test_the_first_pixel_of_a_patch_is_the_highest_bit_and_rows_come_first():
    image = jnp.zeros((1, 6, 6), int).at[0, 0, 2].set(1).at[0, 3, 1].set(1)
    assert image_gpt.to_tokens(image, CONFIG).tolist() == [[0, 8, 0, 1, 0, 0, 0, 0, 0]]


def test_the_class_comes_first_and_the_last_cell_is_left_out():
    tokens = image_gpt.with_class(jnp.array([2]), jnp.array([[1, 5, 9]]), CONFIG)
    assert tokens.tolist() == [[18, 1, 5]]


def test_likelihoods_are_sums_of_log_probabilities():
    logits = RANDOM.standard_normal((2, 3, 5))
    cells = np.array([[0, 4, 2], [1, 1, 3]])
    each = np.log(scipy.special.softmax(logits, -1))
    expected = [sum(each[b, t, cells[b, t]] for t in range(3)) for b in range(2)]
    found = image_gpt.log_likelihood(jnp.asarray(logits, jnp.float32), jnp.asarray(cells))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pictures_and_sequences_of_other_sizes_are_named_in_the_error():
    model, cache = ImageGPT(CONFIG), ImageGPT(CONFIG).empty_cache(1)
    with pytest.raises(ValueError, match=r"\(4, 4\).* side=6"):
        image_gpt.to_tokens(jnp.zeros((1, 4, 4), int), CONFIG)
    with pytest.raises(ValueError, match=r"P=9 .* P=8"):
        image_gpt.to_images(jnp.zeros((1, 8), int), CONFIG)
    with pytest.raises(ValueError, match="T=10 exceeds the 9 cells"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 10), int))
    with pytest.raises(ValueError, match="T=10 exceeds the 9 cells"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 10), int), cache)
