"""Writes `jaxformer/tokenizers/unicode16.bin`, the general category of every code point.

    pip install unicodedata2==16.0.0
    python scripts/make_unicode_table.py

The version is pinned because token ids depend on it: a table that followed the Python version would
cut the same text differently from one machine to the next.
"""

import numpy as np
import unicodedata2

from jaxformer.tokenizers import frozen, unicode

if unicodedata2.unidata_version != "16.0.0":
    raise SystemExit(f"Needs Unicode 16.0.0, unicodedata2 has {unicodedata2.unidata_version}.")

index = {name: i for i, name in enumerate(unicode.CATEGORIES)}
categories = np.array(
    [index[unicodedata2.category(chr(code))] for code in range(0x110000)], np.uint8
)
starts = np.flatnonzero(np.diff(categories, prepend=255))
lengths = np.diff(starts, append=0x110000).astype(np.uint32)
frozen.write("unicode16", [lengths, categories[starts]])
print(f"{len(starts)} runs, {frozen.path('unicode16').stat().st_size} bytes")
