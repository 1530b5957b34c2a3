r"""How text is cut into words before byte pairs are merged: the published patterns, by name.

A pattern is a regular expression in the syntax that Python's `re`, Oniguruma and Rust's regex
crates share, with `\p{..}` and `\s` as Unicode 16 has them, whatever Python's own tables are.
`Pattern.split` runs it as it stands; the known patterns also have a form by array arithmetic, in
`pretokens`, that gives the same cuts many times faster.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from jaxformer.tokenizers import pretokens, unicode

_DIGITS = {
    "free": r"\p{N}+",
    "single": r"\p{N}",
    "threes": r"\p{N}{1,3}",
    "threes_from_right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
}
_TAIL = r"\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclasses.dataclass(frozen=True)
class Pattern:
    r"""A regular expression that cuts text into words; its matches and the gaps between are words.

    Equal patterns have the same expression.

    Attributes:
        regex: The expression; `$` means the end of the text, `\z` as well.
    """

    regex: str

    def split(self, text: str) -> list[str]:
        """Cuts text into words, which joined give the text: what the pattern means.

        Raises:
            ValueError: If the expression is malformed.
        """
        return _cut(self.compiled(text.isascii()), text)

    @property
    def starts(self) -> Callable[[bytes | np.ndarray], np.ndarray] | None:
        """The array form, if the pattern is a known one: see `pretokens.form`."""
        name = known().get(self.regex)
        return None if name is None else pretokens.form(*name, self.split)

    def compiled(self, ascii_only: bool) -> re.Pattern[str]:
        """The expression for Python's `re`; the form for ASCII text is much the smaller."""
        forms = self.__dict__.setdefault("_compiled", {})
        if ascii_only not in forms:
            try:
                forms[ascii_only] = re.compile(_translate(self.regex, 0x80 if ascii_only else 0))
            except re.error as error:
                raise ValueError(f"The pattern {self.regex!r} is malformed: {error}.") from None
        return forms[ascii_only]

    def __getstate__(self) -> dict[str, str]:
        return {"regex": self.regex}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)


def gpt2(digits: str = "free") -> Pattern:
    """GPT-2's pattern; with other digits than "free", numbers take no space before them."""
    space = " ?" if digits == "free" else ""
    return Pattern(
        rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|{space}{_policy(digits)}| ?[^\s\p{{L}}\p{{N}}]+|{_TAIL}"
    )


def cl100k(digits: str = "threes") -> Pattern:
    """GPT-4's pattern as first published and as most ports have it."""
    return Pattern(
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_policy(digits)}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_TAIL}"
    )


def cl100k_tiktoken(digits: str = "threes") -> Pattern:
    """GPT-4's pattern as tiktoken has it since 2024: white space that ends the text is one word."""
    return Pattern(
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_policy(digits)}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+\z|\s*[\r\n]|{_TAIL}"
    )


def o200k(digits: str = "threes") -> Pattern:
    """GPT-4o's pattern: words are cut where upper case follows lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    prefix = r"[^\r\n\p{L}\p{N}]?"
    return Pattern(
        rf"{prefix}{upper}*{lower}+{_SUFFIX}?|{prefix}{upper}+{lower}*{_SUFFIX}?"
        rf"|{_policy(digits)}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_TAIL}"
    )


FAMILIES = {"gpt2": gpt2, "cl100k": cl100k, "cl100k_tiktoken": cl100k_tiktoken, "o200k": o200k}
"""The makers of the published patterns, by name; each takes one of `DIGITS`."""

DIGITS = tuple(_DIGITS)
"""What becomes of a run of digits: one word, single digits, threes from the left or the right."""


def _policy(digits: str) -> str:
    if digits not in _DIGITS:
        raise ValueError(f"digits is one of {', '.join(_DIGITS)}, got {digits!r}.")
    return _DIGITS[digits]


def known() -> dict[str, tuple[str, str]]:
    """The expressions of the published patterns: (family, digits) of each."""
    return {
        make(digits).regex: (family, digits)
        for family, make in FAMILIES.items()
        for digits in _DIGITS
    }


def published(regex: str) -> Pattern:
    """The pattern of an expression as other libraries spell it.

    A spelling known to cut as one of `FAMILIES` does gives that pattern, so that it runs by array
    arithmetic; any other gives `Pattern(regex)`.
    """
    return Pattern(_SPELLINGS.get(regex, regex))


GPT2, CL100K, CL100K_TIKTOKEN, O200K = gpt2(), cl100k(), cl100k_tiktoken(), o200k()

_SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2.regex,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2.regex,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s": CL100K_TIKTOKEN.regex,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+": CL100K.regex,
}


def _cut(compiled: re.Pattern[str], text: str) -> list[str]:
    """The matches and the gaps between them; empty matches are none."""
    words, end = [], 0
    for match in compiled.finditer(text):
        start, stop = match.span()
        if stop == start:
            continue
        if start > end:
            words.append(text[end:start])
        words.append(text[start:stop])
        end = stop
    if end < len(text):
        words.append(text[end:])
    return words


def _translate(regex: str, limit: int) -> str:
    r"""Spells classes and ends of text out for Python's `re`, for code points below a limit."""
    out, inside, i = [], False, 0
    escape = re.compile(r"\\(?:([pP])\{(\^?)(\w+)\}|(.))", re.DOTALL)
    while i < len(regex):
        match = escape.match(regex, i)
        if match is None:
            character = regex[i]
            inside = character == "[" or (inside and character != "]")
            out.append(r"\Z" if character == "$" and not inside else character)
            i += 1
            continue
        i = match.end()
        letter, negated, name, other = match.groups()
        if other and other in "wWbB":
            raise ValueError(f"The pattern {regex!r} holds \\{other}, which has many meanings.")
        if letter or other in ("s", "S", "d", "D"):
            table = unicode.is_space() if other in ("s", "S") else unicode.members(name or "Nd")
            if (letter == "P") != bool(negated) or other in ("S", "D"):
                table = ~table
            ranges = _ranges(table[:limit] if limit else table) or r"\U0010ffff"
            out.append(ranges if inside else f"[{ranges}]")
        else:
            out.append(r"\Z" if other == "z" else match.group())
    return "".join(out)


def _ranges(table: np.ndarray) -> str:
    r"""A boolean table as the inside of a character class."""
    return "".join(
        f"\\U{first:08x}-\\U{last:08x}" if last > first else f"\\U{first:08x}"
        for first, last in unicode.runs(table)
    )
