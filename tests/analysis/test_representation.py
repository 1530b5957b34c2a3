"""Measures of a representation against formulas in NumPy and minimisers in SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analysis import representation

optimize = pytest.importorskip("scipy.optimize")
special = pytest.importorskip("scipy.special")

RANDOM = np.random.default_rng(0)
B, D, CLASSES = 60, 7, 3
CENTRES = RANDOM.standard_normal((CLASSES, D))


def blobs(rows, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    return (CENTRES[labels] + random.standard_normal((rows, D))).astype(np.float32), labels


X, LABELS = blobs(B, 1)
QUERIES, QUERY_LABELS = blobs(23, 2)


def test_the_rank_of_equal_directions_counts_them():
    basis = np.linalg.qr(RANDOM.standard_normal((B, D)))[0]
    for count in (1, 3, D):
        mixed = basis[:, :count] @ np.linalg.qr(RANDOM.standard_normal((count, count)))[0]
        wide = np.pad(mixed, ((0, 0), (0, D - count)))
        np.testing.assert_allclose(representation.effective_rank(wide), count, rtol=1e-6)


def test_the_rank_is_the_exponential_of_the_entropy_and_knows_no_scale():
    shares = np.sqrt(np.linalg.eigvalsh(X.astype(float).T @ X))
    shares /= shares.sum()
    expected = np.exp(special.entr(shares).sum())
    np.testing.assert_allclose(representation.effective_rank(X), expected, rtol=1e-6)
    np.testing.assert_allclose(representation.effective_rank(jnp.asarray(X) * 9), expected, 1e-6)
    assert representation.effective_rank(np.zeros((B, D))) == 0


def test_channels_deviate_by_one_if_white_and_not_at_all_if_constant():
    white = RANDOM.standard_normal((4000, D)) * 5
    np.testing.assert_allclose(representation.channel_deviation(white), 1, atol=0.05)
    assert (representation.channel_deviation(np.full((B, D), 0.5)) == 0).all()
    assert (representation.channel_deviation(np.zeros((B, D))) == 0).all()


def test_a_collapse_is_told_with_its_numbers_and_what_to_try():
    assert representation.check_collapse(X) == representation.effective_rank(X)
    one = np.ones((B, 40)) + 1e-3 * RANDOM.standard_normal((B, 40))
    with pytest.raises(representation.Collapsed) as caught:
        representation.check_collapse(one)
    told = str(caught.value)
    for part in ("rank 1.0", "B=60", "D=40", "1 + 0.05 · 39 = 2.95", "collapsed", "ema_decay"):
        assert part in told
    with pytest.raises(representation.Collapsed, match=r"rank 1\.0.* is below 1 \+ 0\.05 · 3"):
        representation.check_collapse(one[:, :4])  # of few channels, too
    with pytest.raises(representation.Collapsed, match="not finite"):
        representation.check_collapse(np.where(np.arange(D) == 3, np.nan, X))
    with pytest.raises(representation.Collapsed, match=r"0\.99 · 6"):
        representation.check_collapse(X, least=0.99)


def test_features_that_are_no_numbers_are_told():
    spoilt = np.where(np.arange(D) == 3, np.nan, X)
    told = f"{B} of {X.size} features are not finite"
    for measure in (
        lambda: representation.effective_rank(spoilt),
        lambda: representation.nearest(X, spoilt[:, :], 1),
        lambda: representation.nearest(spoilt, X, 1),
        lambda: representation.linear_probe(spoilt, np.arange(B) % 2, X, np.arange(B) % 2),
        lambda: representation.ridge_probe(spoilt, X[:, :1], X, X[:, :1]),
    ):
        with pytest.raises(ValueError, match=told):
            measure()
    assert representation.nearest(X, X[:0], 2)[0].shape == (0, 2)


def test_a_channel_that_is_constant_but_for_rounding_is_left_as_it_is():
    x = np.full((6000, 2), 0.1, np.float32)
    x[:, 1] = np.arange(6000)
    mean, deviation = representation._scale(x)
    assert deviation[0] == 1
    assert deviation[1] == pytest.approx(x[:, 1].std(), rel=1e-6)
    np.testing.assert_allclose(mean, [0.1, 2999.5], rtol=1e-5)


def cosines():
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (QUERIES, X)]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize("block", [5, 23, 512])
def test_the_nearest_are_those_of_a_sort_whatever_the_block(block):
    expected = np.argsort(-cosines(), axis=1)[:, :4]
    found, places = representation.nearest(X, QUERIES, 4, block=block)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(found, np.take_along_axis(cosines(), expected, 1), atol=1e-6)


def test_each_feature_is_nearest_to_itself():
    found, places = representation.nearest(jnp.asarray(X), jnp.asarray(X[3:9]), 1)
    assert places[:, 0].tolist() == [*range(3, 9)]
    np.testing.assert_allclose(found, 1, rtol=1e-6)
    for k in (0, B + 1):
        with pytest.raises(ValueError, match=f"between 1 and 60 .* got k={k}"):
            representation.nearest(X, QUERIES, k)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 10.0), (B, 0.5)])
def test_neighbours_vote_as_in_the_paper(k, temperature):
    hits = 0
    for row, label in zip(cosines(), QUERY_LABELS):
        best = np.argsort(-row)[:k]
        votes = [np.exp(row[i] / temperature) * np.eye(CLASSES)[LABELS[i]] for i in best]
        hits += np.sum(votes, axis=0).argmax() == label
    found = representation.knn_accuracy(
        X, LABELS, QUERIES, QUERY_LABELS, k=k, temperature=temperature
    )
    assert found == hits / len(QUERIES)
    assert found > 0.4


def test_votes_at_a_low_temperature_do_not_overflow():
    found = representation.knn_accuracy(X, LABELS, X, LABELS, temperature=1e-4)
    assert found == 1


@pytest.mark.parametrize("l2", [1e-2, 0.3])
def test_the_logistic_fit_is_the_minimum_that_scipy_finds(l2):
    x = (X - X.mean(axis=0)) / X.std(axis=0)

    def loss(flat):
        kernel, bias = flat[: D * CLASSES].reshape(D, CLASSES), flat[D * CLASSES :]
        log_p = special.log_softmax(x @ kernel + bias, axis=1)
        return -log_p[np.arange(B), LABELS].mean() + l2 / 2 * (kernel**2).sum()

    best = optimize.minimize(loss, np.zeros(D * CLASSES + CLASSES), method="BFGS", tol=1e-7)
    fit = representation.fit_logistic(jnp.asarray(x), jnp.asarray(LABELS), CLASSES, l2, 200, 1e-5)
    np.testing.assert_allclose(fit["kernel"], best.x[: D * CLASSES].reshape(D, -1), atol=2e-3)
    np.testing.assert_allclose(fit["bias"], best.x[D * CLASSES :], atol=2e-3)

    held_out = (QUERIES - X.mean(axis=0)) / X.std(axis=0)
    guesses = np.asarray(held_out @ fit["kernel"] + fit["bias"][None]).argmax(axis=1)
    found = representation.linear_probe(X, LABELS, QUERIES, QUERY_LABELS, l2=l2)
    assert found == (guesses == QUERY_LABELS).mean() > 0.5


def test_a_linear_probe_separates_what_can_be_and_a_constant_channel_hurts_nothing():
    features = np.concatenate([X, np.full((B, 1), 4.0), 30.0 * np.eye(CLASSES)[LABELS]], axis=1)
    features = features.astype(np.float32)
    assert representation.linear_probe(features, LABELS, features, LABELS) == 1


def test_ridge_regression_is_the_least_squares_of_an_extended_problem():
    targets = np.stack([X @ np.arange(D), RANDOM.standard_normal(B), np.sin(X[:, 0])], axis=1)
    truth = np.stack([QUERIES @ np.arange(D), RANDOM.standard_normal(23), np.sin(QUERIES[:, 0])], 1)
    x = (X - X.mean(axis=0)) / X.std(axis=0)
    l2 = 0.05
    extended = np.concatenate([x, np.sqrt(l2 * B) * np.eye(D)])
    goal = np.concatenate([targets - targets.mean(axis=0), np.zeros((D, 3))])
    kernel = np.linalg.lstsq(extended, goal)[0]
    guess = (QUERIES - X.mean(axis=0)) / X.std(axis=0) @ kernel + targets.mean(axis=0)
    expected = 1 - ((guess - truth) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(0)
    found = representation.ridge_probe(X, targets, QUERIES, truth, l2=l2)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    exact = representation.ridge_probe(X, targets[:, :1], QUERIES, truth[:, :1], l2=0.0)
    np.testing.assert_allclose(exact, 1, atol=1e-6)
