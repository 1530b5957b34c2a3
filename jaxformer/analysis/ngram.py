"""A small model of integer sequences with nothing to tune, to compare tokenizers with."""

from collections.abc import Sequence

import numpy as np


def total_bits(
    training: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    *,
    vocab_size: int,
    order: int = 2,
) -> float:
    """Counts the bits that an interpolated n-gram model needs for sequences it has not seen.

    The model is Witten and Bell's: after a context that `N` tokens followed in training, `T` of
    them different, a token that followed it `c` times has the probability
    `(c + T·p') / (N + T)`, where `p'` is that after the context without its first token, and of all
    ids the same below the empty context. A context ends at the beginning of a sequence.

    Args:
        training: Sequences of ids below `vocab_size`.
        held_out: The sequences to measure.
        vocab_size: V, how many ids there are.
        order: Tokens that the model sees at once, the predicted one included.

    Raises:
        ValueError: If `order` is not positive.

    References:
        Witten and Bell 1991, "The zero-frequency problem", method C.
        https://doi.org/10.1109/18.87000; interpolated as in Chen and Goodman 1999, section 2.5.
        https://doi.org/10.1006/csla.1999.0128
    """
    if order < 1:
        raise ValueError(f"An n-gram model needs order >= 1, got {order}.")
    seen, seen_starts = _joined(training)
    new, new_starts = _joined(held_out)
    probability = np.full(len(new), 1 / vocab_size)
    seen_context, new_context = np.zeros(len(seen), np.int64), np.zeros(len(new), np.int64)
    contexts = 1
    for _ in range(order):
        within = seen_context >= 0
        keys = seen_context[within] * vocab_size + seen[within]
        pairs, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
        followers = np.bincount(pairs // vocab_size, counts, contexts)
        kinds = np.bincount(pairs // vocab_size, minlength=contexts)

        known = new_context >= 0
        known[known] = followers[new_context[known]] > 0
        keys = np.where(known, new_context * vocab_size + new, -1)
        found = np.searchsorted(pairs, keys)
        hit = np.append(pairs, -2)[found] == keys
        count = np.where(hit, np.append(counts, 0)[found], 0)[known]
        total, different = followers[new_context[known]], kinds[new_context[known]]
        probability[known] = (count + different * probability[known]) / (total + different)

        # The pair of a context and its token is the next token's longer context.
        pair = np.full(len(seen), -1)
        pair[within] = places
        seen_context = _after(pair, seen_starts)
        new_context = _after(np.where(hit, found, -1), new_starts)
        contexts = len(pairs)
    return float(-np.log2(probability).sum())


def _joined(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(sequence) for sequence in sequences if len(sequence)], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *sequences]).astype(np.int64)
    return tokens, np.cumsum(lengths) - lengths


def _after(pairs: np.ndarray, starts: np.ndarray) -> np.ndarray:
    moved = np.concatenate([[-1], pairs[:-1]])[: len(pairs)]
    moved[starts] = -1
    return moved
