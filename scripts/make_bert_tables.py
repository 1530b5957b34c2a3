"""Writes `jaxformer/tokenizers/bert_*.bin`: what BERT's pipeline does to every code point.

    pip install tokenizers==0.23.3
    python scripts/make_bert_tables.py

The Rust library takes its character data from several crates, each with another version of Unicode,
so that no one version gives its words. The table is read off the library instead: each step is run
on every code point by itself, and on pairs of marks for their order.
"""

import itertools

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from jaxformer.tokenizers import bert_tables, frozen

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
OFF = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False}
HANGUL = range(0xAC00, 0xD7A4)

decompose = normalizers.NFD().normalize_str
lower = normalizers.BertNormalizer(**OFF, lowercase=True).normalize_str
strip = normalizers.BertNormalizer(**OFF | {"strip_accents": True}, lowercase=False).normalize_str
clean = normalizers.BertNormalizer(**OFF | {"clean_text": True}, lowercase=False).normalize_str
split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str


def mark_classes() -> dict[int, int]:
    """The rank, from 1 on, of each mark that canonical ordering moves."""
    marks = [
        char
        for char in map(chr, CODES)
        if decompose(char) == char
        and (
            decompose("\u0345" + char)[0] == char != "\u0345"
            or decompose(char + "\u0334")[0] != char
        )
    ]
    ordered = decompose("".join(marks))
    classes, rank = {ord(ordered[0]): 1}, 1
    for before, char in itertools.pairwise(ordered):
        rank += decompose(char + before) != char + before
        classes[ord(char)] = rank
    return classes


def replacements(replace, codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The code points that change, how many take the place of each, and these."""
    changed = {code: after for code in codes if (after := replace(chr(code))) != chr(code)}
    keys = np.array(list(changed), np.int32)
    sizes = np.array([len(after) for after in changed.values()], np.uint8)
    return (
        keys,
        sizes,
        np.array([ord(char) for after in changed.values() for char in after], np.int32),
    )


classes = mark_classes()
traits = np.zeros(0x110000, np.uint16)
for code in CODES:
    char = chr(code)
    traits[code] = classes.get(code, 0)
    traits[code] |= bert_tables.DELETED * (clean(char) == "")
    traits[code] |= bert_tables.MARK * (decompose(char) == char and strip(char) == "")
    traits[code] |= bert_tables.PUNCTUATION * (len(split(f"a{char}b")) == 3)
starts = np.flatnonzero(np.diff(traits, prepend=traits[0] + 1))
lengths = np.diff(starts, append=0x110000).astype(np.int32)
frozen.write("bert_traits", [traits[starts], lengths])
frozen.write("bert_composed", replacements(decompose, [c for c in CODES if c not in HANGUL]))
frozen.write("bert_upper", replacements(lower, CODES))
size = sum(frozen.path(f"bert_{name}").stat().st_size for name in ("traits", "composed", "upper"))
print(f"tokenizers {tokenizers.__version__}, {len(starts)} runs, {size} bytes")
