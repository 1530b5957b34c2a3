"""Whether tokens end where morphemes do."""

import pathlib
from collections.abc import Sequence

from jaxformer.tokenizers.tokenizer import Tokenizer


def english() -> list[tuple[str, ...]]:
    """Reads the library's own list of English words and their morphemes, `morphemes_en.txt`."""
    path = pathlib.Path(__file__).with_name("morphemes_en.txt")
    lines = path.read_text("utf-8").splitlines()
    return [tuple(line.split()) for line in lines if line and not line.startswith("#")]


def agreement(
    tokenizer: Tokenizer, segmentations: Sequence[Sequence[str]]
) -> tuple[float | None, float | None, float | None]:
    """Compares where a tokenizer cuts words with where their morphemes meet.

    Every word is encoded with a space before it, as it stands in a text. A word that the tokenizer
    refuses, or whose tokens do not end in it, counts as not cut.

    Args:
        tokenizer: Any tokenizer.
        segmentations: The morphemes of each word, as `("un", "kind", "ness")`.

    Returns:
        Precision (of the tokenizer's cuts, None without any), recall (of the morphemes' cuts,
        None without any) and F1, their harmonic mean (0 where no cut agrees), over all words.
    """
    agreed = cuts = wanted = 0
    for parts in segmentations:
        word = "".join(parts)
        found = word_cuts(tokenizer, word)
        true = {len("".join(parts[:i]).encode()) for i in range(1, len(parts))}
        agreed, cuts, wanted = agreed + len(found & true), cuts + len(found), wanted + len(true)
    precision = agreed / cuts if cuts else None
    recall = agreed / wanted if wanted else None
    f1 = 2 * agreed / (cuts + wanted) if cuts + wanted else None
    return precision, recall, f1


def word_cuts(tokenizer: Tokenizer, word: str) -> set[int]:
    """Where tokens end inside a word, in bytes from its start."""
    try:
        ids = tokenizer.encode(f" {word}")
    except ValueError:
        return set()
    pieces = [tokenizer.token_bytes(token, first=not i) for i, token in enumerate(ids)]
    joined, size = b"".join(pieces), len(word.encode())
    place = joined.rfind(word.encode())
    ends, end = set(), -place
    for piece in pieces:
        end += len(piece)
        if 0 < end < size:
            ends.add(end)
    return ends if place >= 0 else set()
