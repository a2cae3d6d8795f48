"""Checks of values that were read from a file: their types, bounds and depth, once, when they are read.

A kind is a function of a value: it returns the value, or raises `Wrong`. `checked` turns `Wrong` into an InputError
that names the place in the file. Kinds nest: `listed(grouped({"name": text(), "seconds": number(0)}))`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from nemo_minitron.artifacts.json_types import Json, JsonObject
from nemo_minitron.errors import InputError

T = TypeVar("T")
Kind = Callable[[object], T]  # takes a value, returns it checked
DEPTH = 32  # deepest nesting of values without a kind of their own
LARGEST = 2**63 - 1
LONGEST = 1 << 24  # most characters of a text
WORDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # a name that is legal for a folder, a file and a shell
SHA256 = re.compile(r"[0-9a-f]{64}")


class Wrong(Exception):
    """A value that is not legal; `place` grows while the exception rises, so that only a refusal pays for it."""

    def __init__(self, value: object, legal: str) -> None:
        self.value, self.legal, self.place = value, legal, []  # type: ignore[var-annotated]


def checked(value: object, kind: Kind[T], what: str) -> T:
    """`value`, checked by `kind`. Raises InputError; `what` names the file in the sentence."""
    try:
        return kind(value)
    except Wrong as wrong:
        place = ".".join(str(part) for part in reversed(wrong.place))
        where = f"'{shown(place, plain=True)}' is " if place else "it holds "
        raise InputError(f"{what} cannot be used: {where}{shown(wrong.value)}, not {wrong.legal}") from None


def shown(value: object, plain: bool = False) -> str:
    """A value for a message, shortened if it is large; `plain`: a text is shown without quotes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    text = short.repr(value)
    return text[1:-1] if plain and isinstance(value, str) else text


# -- kinds ---------------------------------------------------------------------------------------------
def whole(least: int = 0, most: int = LARGEST) -> Kind[int]:
    """A whole number from `least` to `most`; true and false are not numbers."""

    def kind(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            bounds = f"{least} to {most}" if most < LARGEST else f"at least {least}"
            raise Wrong(value, f"a whole number of {bounds}")
        return value

    return kind


def number(least: float = float("-inf"), most: float = float("inf")) -> Kind[float]:
    """A finite float or int from `least` to `most`; an int that no float can hold is not legal."""

    def kind(value: object) -> float:
        legal = f" of {least:g} to {most:g}" if most < float("inf") else f" of at least {least:g}"
        wrong = Wrong(value, "a finite number" + (legal if least > float("-inf") else ""))
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong
        if not -1.7e308 < value < 1.7e308 or not least <= value <= most:  # NaN fails every comparison
            raise wrong
        return value

    return kind


def text(pattern: re.Pattern[str] | None = None, legal: str = "a text", most: int = LONGEST) -> Kind[str]:
    """A text that can be written as UTF-8; `pattern` must match all of it, and `legal` describes that in a refusal."""

    def kind(value: object) -> str:
        if not isinstance(value, str) or len(value) > most or not _encodes(value):
            raise Wrong(value, legal)
        if pattern is not None and not pattern.fullmatch(value):
            raise Wrong(value, legal)
        return value

    return kind


def _encodes(value: str) -> bool:
    """Whether a text has no lone surrogate: JSON can spell one, but UTF-8 cannot."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def flag(value: object) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise Wrong(value, "true or false")
    return value


def maybe(kind: Kind[T]) -> Kind[T | None]:
    """What `kind` takes, or null."""
    return lambda value: None if value is None else kind(value)


def one_of(*values: str) -> Kind[str]:
    def kind(value: object) -> str:
        if not isinstance(value, str) or value not in values:
            raise Wrong(value, f"one of {', '.join(values)}")
        return value

    return kind


def listed(kind: Kind[T], most: int = LARGEST, least: int = 0) -> Kind[list[T]]:
    """A list of `least` to `most` values, each of a kind."""

    def check(value: object) -> list[T]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise Wrong(value, f"a list of at least {least}" if least else "a list")
        return [inside(kind, item, number) for number, item in enumerate(value)]

    return check


def mapped(kind: Kind[T], most: int = LARGEST) -> Kind[dict[str, T]]:
    """An object with any names; each value is of a kind."""

    def check(value: object) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > most:
            raise Wrong(value, "an object")
        return {_name(name): inside(kind, item, name) for name, item in value.items()}

    return check


def grouped(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind[JsonObject]:
    """An object with these names; under any other name it may hold anything that is not nested too deeply."""
    known = {**needed, **(optional or {})}

    def check(value: object) -> JsonObject:
        if not isinstance(value, dict):
            raise Wrong(value, "an object")
        for name in needed:
            if name not in value:
                raise Wrong(value, f"an object with '{name}'")
        return {_name(name): inside(known.get(name, anything()), item, name) for name, item in value.items()}

    return check


def _name(name: str) -> str:
    if not _encodes(name):
        raise Wrong(name, "a name")
    return name


def inside(kind: Kind[T], value: object, place: str | int) -> T:
    """A value within another; a refusal says at which place."""
    try:
        return kind(value)
    except Wrong as wrong:
        wrong.place.append(place)
        raise


def anything(depth: int = DEPTH) -> Kind:
    """Plain values of any kind, nested at most `depth` deep, because later code may recurse into them."""

    def check(value: object) -> Json:
        level = [value]
        for _ in range(depth + 1):
            level = [inner for outer in level for inner in _within(outer)]
            if not level:
                return value
        raise Wrong(value, f"nested at most {depth} deep")

    return check


def _within(value: object) -> Sequence[object]:
    """The values directly inside a list or object; also checks a text and the names of an object."""
    if isinstance(value, str) and not _encodes(value):
        raise Wrong(value, "a text")
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, (list, tuple)) else ()


def unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    """The pairs of a JSON object as a dict. Raises ValueError for a name with two values: the file is ambiguous."""
    values = dict(pairs)
    if len(values) != len(pairs):
        for name, value in pairs:
            if values[name] != value:
                raise ValueError(f"'{shown(name, plain=True)}' occurs twice, with different values")
    return values
