"""Pre-tokenizers of `tokenizer.json` that cut text for byte-level BPE, as patterns and back."""

import re
from typing import Any

from jaxformer.tokenizers import patterns
from jaxformer.tokenizers.patterns import Pattern

# What Oniguruma, Rust's regex crates and our translation to Python read alike.
_ESCAPES = frozenset("pPsSrntzdx") | frozenset("^$.|?*+()[]{}\\/-'\"#&~ ")
_WHOLE = Pattern(r"[\s\S]+")


def write(pattern: Pattern) -> dict[str, Any]:
    """Describes a pattern as a pre-tokenizer.

    Raises:
        ValueError: If the expression holds something that the other library reads otherwise.
    """
    if pattern == patterns.GPT2:
        return _byte_level(use_regex=True)
    _check(pattern.regex)
    split = {"type": "Split", "pattern": {"Regex": pattern.regex}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, _byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def read(value: Any) -> Pattern:
    """The pattern that cuts as a pre-tokenizer does.

    Known are ByteLevel, which cuts as GPT-2 does, and one Split before it.

    Raises:
        ValueError: If it is another pre-tokenizer; the error names it.
    """
    steps = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = value.get("pretokenizers")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"the pre_tokenizer is malformed: {value!r:.80}")
    kinds = [step.get("type") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        names = ", ".join(map(str, kinds)) or "nothing"
        raise ValueError(
            f"the pre_tokenizer ({names}) is not supported: known are ByteLevel, or a "
            "Split and ByteLevel"
        )
    last = steps[-1]
    if last.get("add_prefix_space") is not False:
        raise ValueError("add_prefix_space of the pre_tokenizer ByteLevel is not supported")
    use_regex = "use_regex" not in last or last["use_regex"]
    if len(steps) == 1:
        return patterns.GPT2 if use_regex else _WHOLE
    if use_regex:
        raise ValueError("the pre_tokenizer cuts twice, by Split and by ByteLevel: not supported")
    return _split(steps[0])


def _split(step: dict[str, Any]) -> Pattern:
    given = step.get("pattern")
    if not isinstance(given, dict) or list(given) not in (["Regex"], ["String"]):
        raise ValueError(f"the pattern of Split is malformed: {given!r:.80}")
    [(kind, regex)] = given.items()
    if not isinstance(regex, str) or not regex:
        raise ValueError(f"the pattern of Split is malformed: {given!r:.80}")
    pattern = patterns.published(re.escape(regex) if kind == "String" else regex)
    known = pattern.regex in patterns.known()
    behavior, invert = step.get("behavior"), step.get("invert")
    # What a known pattern leaves between its matches is nothing, so that nothing is removed.
    if behavior != "Isolated" and not (behavior == "Removed" and invert and known):
        raise ValueError(f"the behavior {behavior!r} of Split (invert: {invert}) is not supported")
    if not known:
        _check(pattern.regex)
        pattern = Pattern(re.sub(r"(?<!\\)((?:\\\\)*)\\d", r"\1\\p{Nd}", pattern.regex))
        pattern.compiled(ascii_only=False)
    return pattern


def _check(regex: str) -> None:
    """Refuses what the libraries read differently."""
    inside = False
    for match in re.finditer(r"\\(.)|(\[\^?)|(.)", regex, re.DOTALL):
        escape, opening, other = match.groups()
        what = None
        if escape:
            what = None if escape in _ESCAPES else f"\\{escape}"
        elif opening:
            what = "[ in [..]" if inside else None
            inside = True
        elif other == "]":
            inside = False
        elif other == "&" and inside and regex[match.end() : match.end() + 1] == "&":
            what = "&&"
        elif other in "^$" and not inside:
            what = f"{other} (write \\z for the end of the text)"
        if what:
            raise ValueError(
                f"the pattern {regex!r} holds {what}, which libraries read differently"
            )


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
