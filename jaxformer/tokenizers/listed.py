"""Tokenizers whose vocabulary is a list of strings: their base, and how the list is made."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxformer.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Listed(Tokenizer):
    """A tokenizer whose ids are the places in a list of strings.

    Attributes:
        tokens: The string of each id, None where the id is special or unused.
        unknown: The special token that stands for whatever is not in the list, decoded as its
            name; without one such text is a ValueError.
    """

    tokens: tuple[str | None, ...]
    unknown: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(self.tokens))
        check_special_ids(self.tokens, self.special_tokens)
        if self.unknown is not None and self.unknown not in self.special_tokens:
            raise ValueError(f"The unknown token {self.unknown!r} is no special token.")
        places: dict[str, int] = {}
        for token, string in enumerate(self.tokens):
            if string is None:
                continue
            if places.setdefault(string, token) != token:
                raise ValueError(f"The tokens {places[string]} and {token} are both {string!r}.")
            if not string or any(0xD800 <= ord(c) < 0xE000 for c in string):
                raise ValueError(f"The token {token} is no text: {string!r}.")
        vars(self)["_listed_ids"] = places

    @property
    def vocab_size(self) -> int:
        return max([len(self.tokens), *(token + 1 for token in self.special_tokens.values())])

    @property
    def unknown_id(self) -> int | None:
        """The id of the unknown token, if there is one."""
        return None if self.unknown is None else self.special_tokens[self.unknown]

    def _piece(self, token: int, first: bool) -> bytes:
        if (string := self.tokens[token]) is None:
            raise KeyError(token)
        return string.encode()

    def _unlisted(self, what: str, position: int, of: str = "") -> ValueError:
        code = f" (U+{ord(what):04X})" if len(what) == 1 else ""
        known = "".join(self._ids) if len(self._ids) <= 40 else f"{len(self._ids)} strings"
        return ValueError(
            f"{what!r:.80}{code} at character {position}{of} is no token, and there is no unknown "
            f"token; the tokens are: {known}."
        )

    @property
    def _ids(self) -> dict[str, int]:
        """The id of each string, made with the value and no field of it."""
        return vars(self)["_listed_ids"]

    def to_json(self) -> dict[str, Any]:
        return {
            "jaxformer": type(self).__name__.lower(),
            "tokens": list(self.tokens),
            "unknown": self.unknown,
            "special_tokens": dict(self.special_tokens),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Listed":
        """Reads what `to_json` wrote; raises ValueError if it is malformed."""
        kind = cls.__name__.lower()
        return cls(
            **fields(data, kind, tokens=list, unknown=(str, type(None)), special_tokens=dict)
        )


def check_special_ids(tokens: Sequence[str | None], special_tokens: Mapping[str, int]) -> None:
    """Raises ValueError if a special token's id is negative, or taken."""
    taken: dict[int, str] = {}
    for name, token in special_tokens.items():
        if token < 0:
            raise ValueError(f"The special token {name!r} has the negative id {token}.")
        other = tokens[token] if token < len(tokens) else None
        if other is not None or taken.setdefault(token, name) != name:
            raise ValueError(f"The id {token} of the special token {name!r} is another token's.")


def fields(data: Mapping[str, Any], kind: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Takes fields of the given types out of parsed JSON, and nothing else may be there.

    Raises:
        ValueError: If a field is missing, unknown or of another type.
    """
    if data.get("jaxformer") != kind:
        raise ValueError(f"Expected a tokenizer of kind {kind!r}, got {data.get('jaxformer')!r}.")
    if odd := set(data) ^ {"jaxformer", *types}:
        raise ValueError(f"A tokenizer of kind {kind!r} misses or does not know {sorted(odd)}.")
    for name, expected in types.items():
        if not isinstance(data[name], expected):
            raise ValueError(f"The field {name!r} of {kind!r} is {data[name]!r:.50}.")
    for name, token in dict(data["special_tokens"]).items():
        if type(token) is not int:
            raise ValueError(f"The special token {name!r} has the id {token!r:.50}.")
    for token in data["tokens"] if "tokens" in types else ():
        if not isinstance(token, str | None):
            raise ValueError(f"A token of {kind!r} is no string: {token!r:.50}.")
    return {name: tuple(x) if isinstance(x := data[name], list) else x for name in types}


def by_frequency(counts: Mapping[str, int]) -> list[str]:
    """The strings, the most frequent first, those of one frequency by code points."""
    return sorted(counts, key=lambda string: (-counts[string], string))


def most_frequent(
    counts: Mapping[str, int],
    always: Sequence[str],
    vocab_size: int | None,
    min_frequency: int,
    special_tokens: Sequence[str],
    unknown: str | None,
) -> dict[str, Any]:
    """The fields of a `Listed`: special tokens, what is always there, then the most frequent.

    Raises:
        ValueError: If a string would be left out and there is no unknown token, or `vocab_size`
            does not hold the special tokens and what is always there.
    """
    specials = list(special_tokens)
    if len(set(specials)) < len(specials):
        raise ValueError(f"A special token is named twice: {specials}.")
    if unknown is not None and unknown not in specials:
        specials.append(unknown)
    fixed = len(specials) + len(always)
    if vocab_size is not None and vocab_size < fixed:
        raise ValueError(
            f"vocab_size={vocab_size} does not hold the {len(specials)} special tokens"
            + (f" and {len(always)} characters of white space." if always else ".")
        )
    rest = dict(counts)
    for string in always:
        rest.pop(string, None)
    kept = [string for string in by_frequency(rest) if rest[string] >= min_frequency]
    kept = kept if vocab_size is None else kept[: vocab_size - fixed]
    if unknown is None and (lost := len(rest) - len(kept)):
        raise ValueError(
            f"vocab_size={vocab_size} and min_frequency={min_frequency} leave {lost} of "
            f"{len(rest)} strings without a token, and there is no unknown token."
        )
    return {
        "tokens": (None,) * len(specials) + (*always, *kept),
        "unknown": unknown,
        "special_tokens": {name: token for token, name in enumerate(specials)},
    }
