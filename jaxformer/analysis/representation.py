"""What a representation is worth: how many directions it uses, and what can be read from it.

Features are one row of D numbers for each image, arrays of NumPy or JAX. Nothing here trains the
model that made them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.typing import Array, Float, Int, PyTree

Features = Float[Array, "B D"] | Float[np.ndarray, "B D"]
Labels = Int[Array, "B"] | Int[np.ndarray, "B"]
OtherFeatures = Float[Array, "T D"] | Float[np.ndarray, "T D"]
OtherLabels = Int[Array, "T"] | Int[np.ndarray, "T"]


class Collapsed(RuntimeError):
    """A representation uses next to none of its channels; the text says what to try."""


def effective_rank(features: Features) -> float:
    """Counts the directions that features use: the exponential of their spectrum's entropy.

    The spectrum is that of the singular values, divided by their sum. The result lies between 1,
    all features multiples of one vector, and the lesser of B and D; it is 0 if all are 0. A mean
    counts as a direction: subtract it to measure what is around it.

    Raises:
        ValueError: If a feature is not finite.

    References:
        Roy and Vetterli 2007, "The effective rank", definition 1.
        https://infoscience.epfl.ch/record/110188
        Garrido et al. 2023, "RankMe", eq. 1 (which adds 1e-7 to each share).
        https://arxiv.org/abs/2210.02885
    """
    singular = np.linalg.svd(_finite(features, np.float64), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0


def channel_deviation(features: Features) -> Float[np.ndarray, "D"]:
    """Measures each channel's standard deviation over the rows, in units of the mean square.

    White features of mean 0 have 1 in each channel; features that are all the same have 0.
    """
    x = np.asarray(features, np.float64)
    return x.std(axis=0) / max(float(np.sqrt(np.square(x).mean())), np.finfo(np.float64).tiny)


def check_collapse(features: Features, *, least: float = 0.05) -> float:
    """Returns the effective rank of features, or refuses them.

    Args:
        features: Of many different images.
        least: Share that the effective rank has to reach of the way from 1, where one direction is
            all there is, to the lesser of B and D.

    Raises:
        Collapsed: If it does not, or a feature is not finite.
    """
    if not np.isfinite(np.asarray(features)).all():
        raise Collapsed("features are not finite: lower the learning rate, or clip the gradient.")
    rank, most = effective_rank(features), min(features.shape)
    needed = 1 + least * (most - 1)
    if rank < needed:
        raise Collapsed(
            f"the effective rank {rank:.2f} of B={features.shape[0]} features of "
            f"D={features.shape[1]} is below 1 + {least:g} · {most - 1} = {needed:.2f} (their mean "
            f"channel deviates by {channel_deviation(features).mean():.2g} of the mean square): "
            "the representation has collapsed. Try a slower teacher (ema_decay nearer 1), more "
            "weight on what keeps features apart (KoLeo, variance and covariance), or a lower "
            "learning rate; where targets are probabilities, centre and sharpen them (a lower "
            "temperature of the teacher) or balance them by Sinkhorn-Knopp; and see that no "
            "gradient reaches the targets."
        )
    return rank


def nearest(
    bank: Features, queries: OtherFeatures, k: int, *, block: int = 512
) -> tuple[Float[np.ndarray, "T k"], Int[np.ndarray, "T k"]]:
    """Finds the rows of a bank whose angle to each query is smallest, the nearest first.

    Args:
        bank: Features to search in.
        queries: Features to search for; `block` of them are compared with the bank at once.
        k: How many to find.
        block: A block of 512 and a bank of 60,000 take 120 MB.

    Returns:
        Cosines, and indices into the bank.

    Raises:
        ValueError: If `k` is not between 1 and the size of the bank, or a feature is not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"nearest finds between 1 and {len(bank)} rows of this bank, got k={k}.")
    rows = _unit(jnp.asarray(_finite(bank)))
    find = jax.jit(lambda x: jax.lax.top_k(jnp.matmul(_unit(x), rows.T, precision="highest"), k))
    queries, size = _finite(queries), max(1, min(block, len(queries)))
    found = []
    for start in range(0, max(1, len(queries)), size):
        some = queries[start : start + size]
        filled = np.pad(some, ((0, size - len(some)), (0, 0)))  # one shape, compiled once
        found.append([np.asarray(part)[: len(some)] for part in find(filled)])
    cosines, places = (np.concatenate(parts) for parts in zip(*found))
    return cosines, places


def knn_accuracy(
    bank: Features,
    bank_labels: Labels,
    queries: OtherFeatures,
    labels: OtherLabels,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Measures how often the nearest features of a bank vote for a query's class.

    A neighbour's vote weighs `exp(cosine / temperature)`; of equal classes the lowest wins.

    References:
        Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination",
        section 3.4. https://arxiv.org/abs/1805.01978 (k=20 as in Caron et al. 2021.)
    """
    cosines, places = nearest(bank, queries, k)
    classes = int(max(np.max(bank_labels), np.max(labels))) + 1
    votes = np.zeros((len(queries), classes))
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    np.add.at(votes, (np.arange(len(queries))[:, None], np.asarray(bank_labels)[places]), weights)
    return float((votes.argmax(axis=1) == np.asarray(labels)).mean())


def linear_probe(
    features: Features,
    labels: Labels,
    held_out: OtherFeatures,
    held_out_labels: OtherLabels,
    *,
    l2: float = 1e-4,
    steps: int = 300,
    tolerance: float = 1e-4,
) -> float:
    """Measures how often multinomial logistic regression on features finds the held-out class.

    Features are brought to mean 0 and variance 1 in each channel. L-BFGS minimises the mean
    cross-entropy plus `l2 / 2` times the squared weights, biases free, over all rows at once.

    Args:
        features: To fit.
        labels: Classes from 0.
        held_out: Features to measure on.
        held_out_labels: Their classes.
        l2: Weight of the penalty; scikit-learn's `C` is `1 / (l2 * B)`.
        steps: Of L-BFGS, at most.
        tolerance: Norm of the gradient at which it ends.

    Raises:
        ValueError: If a feature is not finite.
    """
    x, classes = _finite(features, np.float32), int(np.max(labels)) + 1
    mean, deviation = _scale(x)
    fit = fit_logistic(
        jnp.asarray((x - mean) / deviation), jnp.asarray(labels), classes, l2, steps, tolerance
    )
    logits = ((_finite(held_out) - mean) / deviation) @ np.asarray(fit["kernel"])
    guesses = (logits + np.asarray(fit["bias"])).argmax(axis=1)
    return float((guesses == np.asarray(held_out_labels)).mean())


def fit_logistic(
    x: Float[Array, "B D"],
    labels: Int[Array, "B"],
    classes: int,
    l2: float,
    steps: int,
    tolerance: float,
) -> PyTree:
    """Fits the `kernel` and `bias` of `linear_probe` to features that are scaled already."""

    def loss(fit: PyTree) -> Array:
        logits = jnp.matmul(x, fit["kernel"], precision="highest") + fit["bias"][None]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return entropy + l2 / 2 * jnp.square(fit["kernel"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: Any) -> Array:
        _, _, step, norm = carry
        return (step < steps) & (norm > tolerance)

    def improve(carry: Any) -> Any:
        fit, state, step, _ = carry
        value, grad = value_and_grad(fit, state=state)
        updates, state = solver.update(grad, state, fit, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(fit, updates), state, step + 1, optax.tree.norm(grad)

    fit = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    start = (fit, solver.init(fit), jnp.int32(0), jnp.float32(jnp.inf))
    return jax.jit(lambda start: jax.lax.while_loop(unfinished, improve, start))(start)[0]


def fit_ridge(
    features: Features,
    targets: Float[Array, "B V"] | Float[np.ndarray, "B V"],
    *,
    l2: float = 1e-3,
) -> Callable[[Float[np.ndarray, "*T D"]], Float[np.ndarray, "*T V"]]:
    """Fits ridge regression, and returns the function that tells targets from features.

    Features are brought to mean 0 and variance 1 in each channel; the mean squared error plus `l2`
    times the squared weights is minimised in closed form, in float64.

    Raises:
        ValueError: If a feature is not finite.
    """
    x, y = _finite(features, np.float64), np.asarray(targets, np.float64)
    mean, deviation = _scale(x)
    x, offset = (x - mean) / deviation, y.mean(axis=0)
    penalty = l2 * len(x) * np.eye(x.shape[1])
    kernel = np.linalg.solve(x.T @ x + penalty, x.T @ (y - offset))
    return lambda other: (other - mean) / deviation @ kernel + offset


def ridge_probe(
    features: Features,
    targets: Float[Array, "B V"] | Float[np.ndarray, "B V"],
    held_out: OtherFeatures,
    held_out_targets: Float[Array, "T V"] | Float[np.ndarray, "T V"],
    *,
    l2: float = 1e-3,
) -> Float[np.ndarray, "V"]:
    """Measures how much of each held-out target's variance `fit_ridge` explains.

    Returns:
        R² of each target: 1 for perfect guesses, 0 for the held-out mean, negative for worse.
    """
    found = fit_ridge(features, targets, l2=l2)(_finite(held_out))
    truth = np.asarray(held_out_targets, np.float64)
    return 1 - np.square(truth - found).mean(axis=0) / truth.var(axis=0)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _finite(x: Any, dtype: Any = None) -> np.ndarray:
    x = np.asarray(x, dtype)
    if not np.isfinite(x).all():
        raise ValueError(f"{np.sum(~np.isfinite(x))} of {x.size} features are not finite.")
    return x


def _scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, of which one that is constant is left as it is."""
    mean, exact = x.mean(axis=0), x.std(axis=0, dtype=np.float64)
    return mean, np.where(exact > 1e-6 * np.abs(mean), x.std(axis=0), 1)
