"""Hiding tokens: shares as asked for, special ones never, the rest untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import losses, masking

V, MASK, SPECIAL = 23, 4, (0, 1, 2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (200, 500)))
APART = np.isin(np.asarray(TOKENS), (*SPECIAL, MASK))
KEY = jax.random.key(0)


def mask(key=KEY, tokens=TOKENS, special=SPECIAL, **kwargs):
    options = {"vocab_size": V, "mask_token": MASK, "special": special}
    shown, chosen = masking.mask_tokens(key, tokens, **options, **kwargs)
    return np.asarray(shown), np.asarray(chosen)


@pytest.mark.parametrize(("rate", "masked", "replaced"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.3)])
def test_shares_are_those_asked_for(rate, masked, replaced):
    shown, chosen = mask(rate=rate, masked=masked, replaced=replaced)
    tokens, count = np.asarray(TOKENS), (~APART).sum()

    def near(found, share, total):
        assert abs(found - share * total) < 5 * np.sqrt(share * (1 - share) * total)

    near(chosen.sum(), rate, count)
    near((shown == MASK)[chosen].sum(), masked, chosen.sum())
    # Of V - 4 tokens that may be shown in place of one, one is the same.
    other = replaced * (1 - 1 / (V - 4))
    near(((shown != tokens) & (shown != MASK))[chosen].sum(), other, chosen.sum())


def test_special_tokens_are_neither_chosen_nor_shown_and_the_rest_stays():
    shown, chosen = mask(rate=0.9, replaced=0.2)
    assert not chosen[APART].any()
    np.testing.assert_array_equal(shown[~chosen], np.asarray(TOKENS)[~chosen])
    assert not np.isin(shown[chosen], SPECIAL).any()
    assert {*np.unique(shown[chosen])} == {*range(V)} - {*SPECIAL}


def test_replacements_are_evenly_spread():
    shown, chosen = mask(rate=1.0, masked=0.0, replaced=1.0)
    assert (chosen == ~APART).all()
    counts = np.bincount(shown[chosen], minlength=V)
    expected = chosen.sum() / (V - 4)
    assert ((counts - expected) ** 2 / expected)[counts > 0].sum() < 45  # 18 degrees, p = 4e-4


def test_the_extremes_are_exact():
    shown, chosen = mask(rate=0.0)
    assert not chosen.any()
    np.testing.assert_array_equal(shown, TOKENS)
    shown, chosen = mask(rate=1.0, masked=1.0, replaced=0.0)
    np.testing.assert_array_equal(shown, np.where(APART, TOKENS, MASK))


def test_the_same_key_gives_the_same_and_another_another():
    one, again, other = (mask(jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.1


def test_the_loss_is_of_what_was_chosen_alone():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((*TOKENS.shape, V)), "float32")

    @jax.jit
    def loss(logits):
        _, chosen = masking.mask_tokens(KEY, TOKENS, vocab_size=V, mask_token=4, special=SPECIAL)
        each = losses.cross_entropy(logits, TOKENS, where=chosen)
        return losses.masked_mean(each, chosen)

    _, chosen = mask()
    value, slope = jax.value_and_grad(loss)(logits)
    x = np.asarray(logits, np.float64)[chosen]
    right = np.log(np.exp(x).sum(-1)) - x[np.arange(len(x)), np.asarray(TOKENS)[chosen]]
    np.testing.assert_allclose(value, right.mean(), rtol=1e-5)
    assert ((np.abs(slope).max(-1) > 0) == chosen).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1.5}, "rate=1.5"),
        ({"masked": 0.9, "replaced": 0.2}, "replaced=0.2"),
        ({"special": range(V)}, "all V=23 tokens are special"),
    ],
)
def test_nonsense_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        mask(**change)
