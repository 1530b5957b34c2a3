"""Where words start, by array arithmetic: the known patterns without a regular expression.

Every function takes the code points of one or many documents (Latin-1 bytes that are all ASCII, or
UTF-32 as an array), with `BREAK` between documents, and finds the starts from the classes of
neighbouring characters: first a word starts where the class changes, then single rules move or
remove starts. `patterns` holds the expressions that say what is meant.
"""

import functools
from collections.abc import Callable

import numpy as np

from jaxformer.tokenizers import unicode
from jaxformer.tokenizers.ragged import distinct, ragged

LETTER, NUMBER, OTHER, SPACE, BREAK = range(5)
UPPER, LOWER, UNCASED, MARK = range(5, 9)  # o200k tells letters apart, and marks from the others

BREAK_BYTE, BREAK_CODE = 0xFF, 0xDFFF  # neither occurs in text: no UTF-8, no Unicode scalar

Starts = Callable[[bytes | np.ndarray], np.ndarray]


def form(family: str, digits: str, split: Callable[[str], list[str]]) -> Starts:
    """The array form of a published pattern.

    Args:
        family: Which pattern.
        digits: Its policy.
        split: The pattern itself, for stretches of text that are too rare to have a rule.

    Returns:
        A function of the code points: ASCII bytes with `BREAK_BYTE` between documents, or a uint32
        array with `BREAK_CODE`, of length n > 0. It gives n + 1 booleans, true where a word or a
        break starts and at the end.
    """
    rule = {
        "gpt2": _gpt2,
        "cl100k": _cl100k,
        "cl100k_tiktoken": functools.partial(_cl100k, keep_final_space=True),
        "o200k": functools.partial(_o200k, split=split),
    }[family]
    return functools.partial(rule, digits=digits)


# Classes.


@functools.cache
def _table(fine: bool) -> np.ndarray:
    """The class of every code point; `fine` tells letters and marks apart."""
    table = np.full(0x110000, OTHER, np.uint8)
    groups = {"N": NUMBER, "L": LETTER}
    if fine:
        groups = {"N": NUMBER, "L": UNCASED, "M": MARK, "Lu": UPPER, "Lt": UPPER, "Ll": LOWER}
    for name, kind in groups.items():
        table[unicode.members(name)] = kind
    table[unicode.is_space()] = SPACE
    table[BREAK_CODE] = BREAK
    table.setflags(write=False)
    return table


@functools.cache
def _ascii_table(fine: bool) -> bytes:
    """The same for ASCII, written out so that English needs no Unicode table."""
    table = np.full(256, OTHER, np.uint8)
    table[ord("0") : ord("9") + 1] = NUMBER
    table[ord("A") : ord("Z") + 1] = UPPER if fine else LETTER
    table[ord("a") : ord("z") + 1] = LOWER if fine else LETTER
    table[[*range(9, 14), 32]] = SPACE
    table[BREAK_BYTE] = BREAK
    return table.tobytes()


def _classes(text: bytes | np.ndarray, fine: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Code points and their classes."""
    if isinstance(text, bytes):
        kinds = np.frombuffer(text.translate(_ascii_table(fine)), np.uint8)
        return np.frombuffer(text, np.uint8), kinds
    return text, _table(fine)[text]


def _changes(kinds: np.ndarray) -> np.ndarray:
    """A word starts where the class changes; room for three positions beyond the end."""
    starts = np.ones(kinds.size + 4, bool)
    np.not_equal(kinds[1:], kinds[:-1], out=starts[1 : kinds.size])
    return starts


# Rules. Each changes `starts` in place.


def _contractions(codes: np.ndarray, at: np.ndarray, fold: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of the apostrophes `at`, those before s, d, m, t and those before ll, ve, re."""
    size = codes.size
    at = at[at + 1 < size]
    first, second = codes[at + 1], codes[np.minimum(at + 2, size - 1)]
    long_s = np.zeros(at.size, bool)
    if fold:  # case is ignored, and U+017F is a lower-case s
        long_s = first == 0x17F
        first = np.where(first < 128, first | 32, 0)
        second = np.where(second < 128, second | 32, 0)
    short = (first == 115) | (first == 100) | (first == 109) | (first == 116) | long_s
    pair = (first.astype(np.uint32) << 8) | second
    long = (pair == 0x6C6C) | (pair == 0x7665) | (pair == 0x7265)
    long &= (at + 2 < size) & (second < 128)
    return at[short], at[long]


def _cut_numbers(starts: np.ndarray, kinds: np.ndarray, digits: str) -> None:
    """Cuts runs of digits as the policy says."""
    if digits == "free":
        return
    number = kinds == NUMBER
    if digits == "single":
        starts[:-4][number] = True
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[False], number, [False]])))
    first, after = edges[::2], edges[1::2]
    long = after - first > 3
    if not long.any():
        return
    first, length = first[long], (after - first)[long]
    cuts = (length - 1) // 3
    offset = np.where(length % 3, length % 3, 3) if digits == "threes_from_right" else 3
    starts[ragged(first + offset, cuts, step=3)] = True


def _newlines_after_other(
    starts: np.ndarray, newline: np.ndarray, streak: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """Newlines directly after punctuation belong to it, and all of their streak.

    Returns:
        The characters that are joined in this way.
    """
    at = np.flatnonzero(newline[1:] & other[:-1]) + 1
    if not at.size:
        return at
    ends = np.flatnonzero(streak[:-1] & ~streak[1:]) + 1
    end = np.append(ends, streak.size)[np.searchsorted(ends, at)]
    joined = ragged(at, end - at)
    starts[joined] = False
    starts[end] = True
    return joined


def _cut_after_last_newline(
    starts: np.ndarray, newline: np.ndarray, space: np.ndarray, text_ends: np.ndarray | None
) -> None:
    """In a run of white space a word ends after its last newline.

    Given where texts end, a run that ends its text stays whole.
    """
    at = np.flatnonzero(newline)
    if not at.size:
        return
    end = at + 1  # of the run, for most newlines
    follows = np.append(space[1:], False)
    within = np.flatnonzero(follows[at])
    if within.size:
        ends = np.flatnonzero(space & ~follows & np.append(False, space[:-1])) + 1
        end[within] = ends[np.searchsorted(ends, at[within], side="right")]
    last = np.append(end[1:] != end[:-1], True)
    if text_ends is not None:
        last &= ~text_ends[end]
    starts[at[last] + 1] = True


def _lend_space(
    starts: np.ndarray, lends: np.ndarray, blank: np.ndarray, any_of: np.ndarray, of: np.ndarray
) -> None:
    """The last white space before other characters starts a word, and may join the next.

    Args:
        starts: Changed.
        lends: White space that starts a word if it is the last of its run.
        blank: Where it is a blank.
        any_of: Characters that any white space joins.
        of: Characters that a blank joins.
    """
    joined = lends & (any_of[1:] | (of[1:] & blank[:-1]))
    size = blank.size
    starts[: size - 1] |= lends
    starts[1:size] &= ~joined


def _last_spaces(kinds: np.ndarray, space: np.ndarray) -> np.ndarray:
    """Where white space is followed by a character that is none."""
    return space[:-1] & (kinds[1:] != SPACE) & (kinds[1:] != BREAK)


# Patterns.


def _gpt2(text: bytes | np.ndarray, *, digits: str) -> np.ndarray:
    codes, kinds = _classes(text)
    starts = _changes(kinds)
    none, joins = np.zeros(kinds.size, bool), kinds < SPACE
    if digits != "free":
        joins &= kinds != NUMBER
    _lend_space(starts, _last_spaces(kinds, kinds == SPACE), codes == 32, none, joins)
    quote = np.flatnonzero(codes == 39)
    if quote.size:
        short, long = _contractions(codes, quote[starts[quote]], fold=False)
        starts[short + 1] = False
        starts[short + 2] = True
        starts[long + 1] = starts[long + 2] = False
        starts[long + 3] = True
    _cut_numbers(starts, kinds, digits)
    return _closed(starts, kinds.size)


def _cl100k(text: bytes | np.ndarray, *, digits: str, keep_final_space: bool = False) -> np.ndarray:
    codes, kinds = _classes(text)
    text_ends = np.append(kinds == BREAK, True) if keep_final_space else None
    starts = _changes(kinds)
    letter = kinds == LETTER
    _cut_spaces(starts, codes, kinds, letter, text_ends)
    prefix = _prefixes(starts, kinds, letter)
    short, long = _contractions(codes, prefix[codes[prefix] == 39], fold=True)
    starts[short + 2] = True
    starts[long + 2] = False
    starts[long + 3] = True
    _cut_numbers(starts, kinds, digits)
    return _closed(starts, kinds.size)


def _cut_spaces(
    starts: np.ndarray,
    codes: np.ndarray,
    kinds: np.ndarray,
    letter: np.ndarray,
    text_ends: np.ndarray | None = None,
    slash: bool = False,
) -> None:
    """White space as GPT-4 and later have it; with `slash`, slashes go with newlines."""
    space, other = kinds == SPACE, kinds == OTHER
    newline = (codes == 10) | (codes == 13)
    streak = newline | (codes == 47) if slash else newline
    joined = _newlines_after_other(starts, newline, streak, other)
    space[joined] = False
    newline[joined] = False
    _cut_after_last_newline(starts, newline, space, text_ends)
    lends = _last_spaces(kinds, space) & ~newline[:-1]
    _lend_space(starts, lends, codes == 32, letter, other)


def _prefixes(starts: np.ndarray, kinds: np.ndarray, letter: np.ndarray) -> np.ndarray:
    """One character that is no letter, number or space joins the letters after it."""
    size = kinds.size
    prefix = (kinds[:-1] == OTHER) & letter[1:] & starts[: size - 1]
    starts[1:size] &= ~prefix
    return np.flatnonzero(prefix)


def _o200k(
    text: bytes | np.ndarray, *, digits: str, split: Callable[[str], list[str]]
) -> np.ndarray:
    codes, fine = _classes(text, fine=True)
    letter = fine >= UPPER
    kinds = fine * ~letter  # LETTER is 0
    starts = _changes(kinds)
    _cut_spaces(starts, codes, kinds, letter, slash=True)
    _prefixes(starts, kinds, letter)
    starts[1 : codes.size] |= (fine[1:] == UPPER) & (fine[:-1] == LOWER)
    odd = np.zeros(0, np.int64)
    if not isinstance(text, bytes):
        _cut_mixed_case(starts, fine)
        odd = np.flatnonzero((fine[1:] == MARK) & (kinds[:-1] == OTHER)) + 1
    suffix = _attach_suffixes(starts, codes, letter)
    _cut_numbers(starts, kinds, digits)
    if odd.size or suffix.size:
        uncased = (fine == UNCASED) | (fine == MARK)
        odd = distinct(odd, suffix[uncased[np.minimum(suffix, codes.size - 1)]])
        _redo(starts, codes, fine, odd, split)
    return _closed(starts, kinds.size)


def _cut_mixed_case(starts: np.ndarray, fine: np.ndarray) -> None:
    """Upper case after letters without case, which count as either.

    It starts a word if the last letter with a case before it was lower; and it does so if the word
    would end with this upper case, none of it lower.
    """
    size = fine.size
    upper, uncased = fine == UPPER, (fine == UNCASED) | (fine == MARK)
    after = np.flatnonzero(upper[1:] & uncased[:-1]) + 1
    if not after.size:
        return
    anchors = np.flatnonzero((upper | (fine == LOWER)) | starts[:size])
    anchor = anchors[np.searchsorted(anchors, after) - 1]
    starts[after[fine[anchor] == LOWER]] = True
    after = after[~starts[after]]
    goes_on = np.append(~starts[1:size], False)
    follows = np.append(upper[1:], False) & goes_on
    ends = np.flatnonzero(upper & ~follows)
    end = ends[np.searchsorted(ends, after)]
    goes_on &= np.append(fine[1:] >= UPPER, False)
    starts[after[~goes_on[end]]] = True


def _attach_suffixes(starts: np.ndarray, codes: np.ndarray, letter: np.ndarray) -> np.ndarray:
    """A contraction belongs to the word before it; returns where the suffixes end."""
    quote = np.flatnonzero(codes == 39)
    quote = quote[(quote > 0) & letter[np.maximum(quote - 1, 0)]]
    short, long = _contractions(codes, quote, fold=True)
    at = np.concatenate([short, long])
    if not at.size:
        return at
    order = np.argsort(at)
    at, end = at[order], np.concatenate([short + 2, long + 3])[order]
    # In a chain such as a's's's a suffix cannot itself bear one: every second starts a word.
    first = np.append(True, at[1:] != end[:-1])
    chain = np.flatnonzero(first)[np.cumsum(first) - 1]
    borne = (np.arange(at.size) - chain) % 2 == 0
    at, end = at[borne], end[borne]
    starts[at] = starts[at + 1] = False
    starts[end - 1] = False
    starts[end] = True
    return end


def _redo(
    starts: np.ndarray,
    codes: np.ndarray,
    fine: np.ndarray,
    odd: np.ndarray,
    split: Callable[[str], list[str]],
) -> None:
    """Cuts the stretches around the odd places with the regular expression.

    A stretch reaches from white space after a letter or a number, where a word always starts, to
    the next such place.
    """
    if not odd.size:
        return
    solid = (fine == NUMBER) | ((fine >= UPPER) & (fine != MARK))
    safe = np.flatnonzero((solid[:-1] & (fine[1:] == SPACE)) | (fine[1:] == BREAK)) + 1
    safe = distinct(np.array([0, codes.size]), safe, np.flatnonzero(fine == BREAK) + 1)
    for i in distinct(np.searchsorted(safe, odd, side="right")).tolist():
        first, end = int(safe[i - 1]), int(safe[i])
        text = codes[first:end].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        starts[first:end] = False
        place = first
        for word in split(text):
            starts[place] = True
            place += len(word)


def _closed(starts: np.ndarray, size: int) -> np.ndarray:
    starts[size] = True
    return starts[: size + 1]
