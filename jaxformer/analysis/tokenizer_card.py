"""Measures the four properties that a tokenizer should have, and prints them side by side.

Stability: a small change of text changes few ids. Efficiency: few tokens hold much text.
Universality: every text and every byte can be encoded, and comes back. Learnability: a model that
is trained on the ids predicts text well. Figures are means over texts and depend on them; bits per
byte can be compared between any tokenizers that lose nothing, loss per token cannot.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.analysis import edit_distance, morphemes, ngram
from jaxformer.tokenizers import plain
from jaxformer.tokenizers.tokenizer import Tokenizer

Card = dict[str, int | float | None]


def stability(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    edits: int = 1000,
    seed: int = 0,
    length: int = 1000,
) -> Card:
    """Measures how many ids a change of one character changes.

    Each edit inserts, deletes or substitutes a character, with equal chances, anywhere in an
    excerpt of the texts; new characters are drawn from the texts.

    Args:
        tokenizer: Any tokenizer.
        texts: What excerpts are drawn from, long texts more often.
        edits: How many to draw.
        seed: Of the draws.
        length: Of an excerpt, in characters.

    Returns:
        `edit_distance_mean` and `edit_distance_p95`, the 95th percentile, in tokens, and
        `edits_refused`, how many could not be measured because there is no token for a character;
        None for the first two if that is so for all.

    Raises:
        ValueError: If the texts are empty, or `edits` or `length` is less than 1.
    """
    _at_least(1, edits=edits, length=length)
    draw = random.Random(seed)
    whole = _nonempty(texts)
    before, after = [], []
    for text in draw.choices(whole, [len(text) for text in whole], k=edits):
        start = draw.randrange(max(len(text) - length, 0) + 1)
        excerpt = text[start : start + length]
        other = draw.choice(whole)
        before.append(excerpt)
        after.append(_edited(excerpt, other[draw.randrange(len(other))], draw))
    distances = [
        edit_distance.levenshtein(left, right)
        for left, right in zip(_each(tokenizer, before), _each(tokenizer, after))
        if left is not None and right is not None
    ]
    mean = p95 = None
    if distances:
        mean = float(np.mean(distances))
        p95 = float(np.percentile(distances, 95, method="inverted_cdf"))
    refused = edits - len(distances)
    return {"edit_distance_mean": mean, "edit_distance_p95": p95, "edits_refused": refused}


def _edited(text: str, character: str, draw: random.Random) -> str:
    kind = draw.choice(("insert", "delete", "substitute"))
    place = draw.randrange(len(text) + (kind == "insert"))
    if kind == "substitute" and text[place] == character:
        kind = "insert"  # else nothing would change
    rest = text[place + (kind != "insert") :]
    return text[:place] + (character if kind != "delete" else "") + rest


def efficiency(tokenizer: Tokenizer, texts: Sequence[str]) -> Card:
    """Measures how much text a token holds.

    Returns:
        `bytes_per_token` of UTF-8; `tokens_per_word`, where words are what white space parts;
        `unknown_share`, the share of tokens that are the unknown one; and `lossy_lines`, the share
        of lines, without their ends, that do not come back: what is lost is not held.

    Raises:
        ValueError: If the texts are empty, or the tokenizer refuses them.
    """
    whole = _nonempty(texts)
    ids = np.concatenate([tokenizer.encode_array(text) for text in whole])
    words = sum(not plain.is_space(word) for text in whole for word in plain.WORDS.split(text))
    unknown = 0.0 if tokenizer.unknown_id is None else np.mean(ids == tokenizer.unknown_id)
    lines = [line for text in whole for line in text.splitlines()]
    lost = [tokenizer.decode(x) != line for x, line in zip(tokenizer.encode_batch(lines), lines)]
    return {
        "bytes_per_token": sum(len(text.encode()) for text in whole) / max(len(ids), 1),
        "tokens_per_word": len(ids) / words if words else None,
        "unknown_share": float(unknown),
        "lossy_lines": sum(lost) / len(lines),
    }


def universality(
    tokenizer: Tokenizer, *, strings: int = 100_000, seed: int = 0, every: int = 1
) -> Card:
    """Counts what cannot be encoded, over all Unicode scalars and random bytes.

    Args:
        tokenizer: Any tokenizer.
        strings: Random byte strings, of 1 to 16 bytes.
        seed: Of these strings.
        every: Takes only each so-maniest scalar, to be quicker.

    Returns:
        `scalars` and `strings`, how many were tried, and of each how many were `_refused` with a
        ValueError, gave an `_unknown` token, or came back otherwise `_changed`.

    Raises:
        ValueError: If `strings` is negative or `every` is less than 1.
    """
    _at_least(0, strings=strings)
    _at_least(1, every=every)
    scalars = [chr(code) for code in range(0, 0x110000, every) if not 0xD800 <= code < 0xE000]
    counts = {"scalars_refused": 0, "scalars_unknown": 0, "scalars_changed": 0}
    for start in range(0, len(scalars), 65536):
        batch = scalars[start : start + 65536]
        for text, ids in zip(batch, _each(tokenizer, batch)):
            if ids is None:
                counts["scalars_refused"] += 1
            elif tokenizer.unknown_id in ids:
                counts["scalars_unknown"] += 1
            elif tokenizer.decode(ids) != text:
                counts["scalars_changed"] += 1
    draw = random.Random(seed)
    counts |= {"strings_refused": 0, "strings_unknown": 0, "strings_changed": 0}
    for _ in range(strings):
        data = draw.randbytes(draw.randint(1, 16))
        try:
            ids = tokenizer.encode_bytes(data)
        except ValueError:
            counts["strings_refused"] += 1
            continue
        if tokenizer.unknown_id in ids:
            counts["strings_unknown"] += 1
        elif tokenizer.decode_bytes(ids) != data:
            counts["strings_changed"] += 1
    return {"scalars": len(scalars), "strings": strings, **counts}


def _each(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of each text, None where it is refused."""
    try:
        return list(tokenizer.encode_batch(texts) if len(texts) > 1 else [tokenizer.encode(*texts)])
    except ValueError:
        if len(texts) == 1:
            return [None]
    size = -(-len(texts) // 64)  # parts for which it is tried again
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [ids for part in parts for ids in _each(tokenizer, part)]


def learnability(
    tokenizer: Tokenizer,
    training: Sequence[str],
    held_out: Sequence[str],
    *,
    order: int = 2,
    segmentations: Sequence[Sequence[str]] | None = None,
) -> Card:
    """Measures how well a small model predicts text by its tokens, and whether these are morphemes.

    Args:
        tokenizer: Any tokenizer; one that loses text is predicted too well.
        training: Texts for the n-gram model of `ngram.total_bits`.
        held_out: Other texts, which the bits are counted of.
        order: Of the n-gram model.
        segmentations: Morphemes of words, as for `morphemes.agreement`; the library's English list
            if None.

    Returns:
        `bits_per_byte` of UTF-8, and `morpheme_precision`, `morpheme_recall` and `morpheme_f1`.

    Raises:
        ValueError: If texts are empty, or the tokenizer refuses them.
    """
    new = _nonempty(held_out)
    bits = ngram.total_bits(
        [tokenizer.encode_array(text) for text in _nonempty(training)],
        [tokenizer.encode_array(text) for text in new],
        vocab_size=tokenizer.vocab_size,
        order=order,
    )
    words = morphemes.english() if segmentations is None else segmentations
    precision, recall, f1 = morphemes.agreement(tokenizer, words)
    return {
        "bits_per_byte": bits / sum(len(text.encode()) for text in new),
        "morpheme_precision": precision,
        "morpheme_recall": recall,
        "morpheme_f1": f1,
    }


def reencoding(
    tokenizer: Tokenizer, texts: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> Card:
    """Measures how often decoded ids are encoded to others: what a model writes may not be its own.

    Returns:
        `reencoded_cuts`, the share of stretches of 1 to 64 tokens, cut out of the texts' ids, that
        change, and `reencoded_pairs`, that of pairs of ordinary ids drawn at random. Bytes that
        cannot be encoded count as a change.

    Raises:
        ValueError: If the texts are empty or have no ids, the tokenizer refuses them, or `draws`
            is less than 1.
    """
    _at_least(1, draws=draws)
    draw = random.Random(seed)
    encoded = [ids for ids in tokenizer.encode_batch(_nonempty(texts)) if ids]
    if not encoded:
        raise ValueError("There is no text to measure on: it has no ids.")
    cuts = []
    for ids in draw.choices(encoded, [len(ids) for ids in encoded], k=draws):
        start = draw.randrange(len(ids))
        cuts.append(ids[start : start + draw.randint(1, 64)])
    pairs = [[_ordinary(tokenizer, draw) for _ in range(2)] for _ in range(draws)]
    return {
        "reencoded_cuts": sum(_changes(tokenizer, ids) for ids in cuts) / draws,
        "reencoded_pairs": sum(_changes(tokenizer, ids) for ids in pairs) / draws,
    }


def _changes(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    try:
        return tokenizer.encode_bytes(tokenizer.decode_bytes(ids)) != list(ids)
    except ValueError:
        return True


def _ordinary(tokenizer: Tokenizer, draw: random.Random) -> int:
    """Draws an id that is neither special nor unused."""
    special = set(tokenizer.special_tokens.values())
    for _ in range(10_000):
        token = draw.randrange(tokenizer.vocab_size)
        try:
            tokenizer.token_bytes(token)
        except ValueError:
            continue
        if token not in special:
            return token
    raise ValueError(f"Of {tokenizer.vocab_size} ids hardly one is an ordinary token.")


def card(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    training: Sequence[str] | None = None,
    edits: int = 1000,
    strings: int = 100_000,
    every: int = 1,
    seed: int = 0,
) -> Card:
    """Measures everything above: some ten seconds for a tokenizer and a megabyte.

    Args:
        tokenizer: Any tokenizer.
        texts: What to measure on.
        training: What the n-gram model is trained on; if None, `texts` without the last tenth of
            their characters, and its bits are counted on that tenth.
        edits: One-character edits, and draws of ids to encode again.
        strings: Random byte strings.
        every: Takes only each so-maniest Unicode scalar.
        seed: Of all draws.

    Returns:
        Numbers by name, `vocab_size` first; None where one has no meaning.

    Raises:
        ValueError: If the texts are empty, or too short to be parted; if the tokenizer refuses
            them; or if `edits` or `every` is less than 1 or `strings` is negative.
    """
    known, new = (training, texts) if training is not None else _last_tenth(_nonempty(texts))
    if training is None and not any(known):
        raise ValueError("A text of 1 character leaves none for training, which takes nine tenths.")
    return {
        "vocab_size": tokenizer.vocab_size,
        **efficiency(tokenizer, texts),
        **stability(tokenizer, texts, edits=edits, seed=seed),
        **universality(tokenizer, strings=strings, every=every, seed=seed),
        **learnability(tokenizer, known, new),
        **reencoding(tokenizer, texts, draws=edits, seed=seed),
    }


ROWS = {
    "Size": {"vocab_size": ("vocabulary", ",.0f")},
    "Efficiency": {
        "bytes_per_token": ("bytes per token", ".2f"),
        "tokens_per_word": ("tokens per word", ".2f"),
        "unknown_share": ("unknown tokens", ".2%"),
        "lossy_lines": ("lines that are changed", ".2%"),
    },
    "Stability": {
        "edit_distance_mean": ("ids changed by an edit, mean", ".2f"),
        "edit_distance_p95": ("95th percentile", ".0f"),
        "edits_refused": ("edits refused", ",.0f"),
    },
    "Universality": {
        "scalars_refused": ("scalars refused", ",.0f"),
        "scalars_unknown": ("scalars unknown", ",.0f"),
        "scalars_changed": ("scalars changed", ",.0f"),
        "strings_refused": ("byte strings refused", ",.0f"),
        "strings_unknown": ("byte strings unknown", ",.0f"),
        "strings_changed": ("byte strings changed", ",.0f"),
    },
    "Learnability": {
        "bits_per_byte": ("bits per byte, bigrams", ".3f"),
        "morpheme_precision": ("cuts at morphemes, precision", ".2f"),
        "morpheme_recall": ("recall", ".2f"),
        "morpheme_f1": ("F1", ".2f"),
    },
    "Encoding again": {
        "reencoded_cuts": ("cut texts that change", ".2%"),
        "reencoded_pairs": ("random pairs that change", ".2%"),
    },
}
"""How a card is printed: under each property, the label and format of each number."""


def table(cards: Mapping[str, Card]) -> Any:
    """Puts cards side by side in a `rich.table.Table`, a column for each name."""
    from rich.table import Table

    first = next(iter(cards.values()))
    result = Table(
        caption=f"{first['scalars']:,.0f} Unicode scalars, {first['strings']:,.0f} byte strings",
        caption_justify="left",
    )
    result.add_column("", min_width=max(map(len, ROWS)))
    for name in cards:
        result.add_column(name, justify="right", overflow="fold")
    for heading, measures in ROWS.items():
        result.add_section()
        result.add_row(f"[bold]{heading}[/bold]")
        for key, (label, form) in measures.items():
            values = [one[key] for one in cards.values()]
            shown = ["–" if value is None else format(value, form) for value in values]
            result.add_row(f"  {label}", *shown)
    return result


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is at least {least}, got {value}.")


def _nonempty(texts: Iterable[str]) -> list[str]:
    found = [text for text in texts if text]
    if not found:
        raise ValueError("There is no text to measure on.")
    return found


def _last_tenth(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts texts at nine tenths of their characters, or at the first space after that."""
    left = sum(len(text) for text in texts) * 9 // 10
    known, new = [], []
    for text in texts:
        place = max(text.find(" ", left), left)
        known.append(text[:place])
        new.append(text[place:])
        left = max(left - len(text), 0) if place >= len(text) else 0
    return known, new
