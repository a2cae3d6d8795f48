"""What a file says, distrusted: the types, bounds and depth of plain values, checked once, where they are read.

A kind is a function of a value: it gives the value back, or raises `Wrong`. `checked` turns that into an InputError
that names the place in the file. Kinds nest: `listed(grouped({"name": text(), "seconds": number(0)}))`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_minitron.errors import InputError

Kind = Callable[[Any], Any]
DEPTH = 32  # of values that have no kind of their own
LARGEST = 2**63 - 1
LONGEST = 1 << 24  # characters of a text
WORDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # a name that is a folder's, a file's and a shell's alike
SHA256 = re.compile(r"[0-9a-f]{64}")


class Wrong(Exception):
    """A value that is not legal; `place` grows on the way out, so that it is put together for a refusal alone."""

    def __init__(self, value: Any, legal: str) -> None:
        self.value, self.legal, self.place = value, legal, []  # type: ignore[var-annotated]


def checked(value: Any, kind: Kind, what: str) -> Any:
    """`value`, as `kind` gives it back. Raises InputError; `what` names the file in its sentence."""
    try:
        return kind(value)
    except Wrong as wrong:
        place = ".".join(str(part) for part in reversed(wrong.place))
        where = f"'{shown(place, plain=True)}' is " if place else "it holds "
        raise InputError(f"{what} cannot be used: {where}{shown(wrong.value)}, not {wrong.legal}") from None


def shown(value: Any, plain: bool = False) -> str:
    """A value for a message: short however large it is; `plain`: a text without quotes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    text = short.repr(value)
    return text[1:-1] if plain and isinstance(value, str) else text


# -- kinds ---------------------------------------------------------------------------------------------
def whole(least: int = 0, most: int = LARGEST) -> Kind:
    """A whole number; true and false are none."""

    def kind(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise Wrong(value, f"a whole number of {least} to {most}" if most < LARGEST else f"one of at least {least}")
        return value

    return kind


def number(least: float = float("-inf"), most: float = float("inf")) -> Kind:
    """A finite number, as float or int; an int that no float holds is none."""

    def kind(value: Any) -> float:
        finite = type(value) in (int, float) and -1.7e308 < value < 1.7e308  # of NaN neither is true
        if not finite or not least <= value <= most:
            bounds = f" of {least:g} to {most:g}" if most < float("inf") else f" of at least {least:g}"
            raise Wrong(value, "a finite number" + (bounds if least > float("-inf") else ""))
        return value

    return kind


def text(pattern: re.Pattern[str] | None = None, legal: str = "a text", most: int = LONGEST) -> Kind:
    """A text that can be written as UTF-8; `pattern` is matched with all of it, and said as `legal`."""

    def kind(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most or not _encodes(value):
            raise Wrong(value, legal)
        if pattern is not None and not pattern.fullmatch(value):
            raise Wrong(value, legal)
        return value

    return kind


def _encodes(value: str) -> bool:
    """Whether a text has no lone surrogate, which JSON can name and no file can hold."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise Wrong(value, "true or false")
    return value


def maybe(kind: Kind) -> Kind:
    """What `kind` takes, or null."""
    return lambda value: None if value is None else kind(value)


def one_of(*values: str) -> Kind:
    def kind(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise Wrong(value, f"one of {', '.join(values)}")
        return value

    return kind


def listed(kind: Kind, most: int = LARGEST, least: int = 0) -> Kind:
    """A list, each of its values of a kind."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise Wrong(value, f"a list of at least {least}" if least else "a list")
        return [inside(kind, item, number) for number, item in enumerate(value)]

    return check


def mapped(kind: Kind, most: int = LARGEST) -> Kind:
    """An object of any names, each of its values of a kind."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise Wrong(value, "an object")
        return {_name(name): inside(kind, item, name) for name, item in value.items()}

    return check


def grouped(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these names; what has another name may be anything that is not nested too deeply."""
    known = {**needed, **(optional or {})}

    def check(value: Any) -> dict[str, Any]:
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


def inside(kind: Kind, value: Any, place: str | int) -> Any:
    """A value within another; a refusal says at which place."""
    try:
        return kind(value)
    except Wrong as wrong:
        wrong.place.append(place)
        raise


def anything(depth: int = DEPTH) -> Kind:
    """Plain values of any kind, nested at most `depth` deep: what is done with them later may go down into them."""

    def check(value: Any) -> Any:
        level = [value]
        for _ in range(depth + 1):
            level = [inner for outer in level for inner in _within(outer)]
            if not level:
                return value
        raise Wrong(value, f"nested at most {depth} deep")

    return check


def _within(value: Any) -> Sequence[Any]:
    """The values of one list or object, after a look at what they are."""
    if isinstance(value, str) and not _encodes(value):
        raise Wrong(value, "a text")
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, (list, tuple)) else ()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object. Raises ValueError for a name with two values: which one is meant nobody knows."""
    values = dict(pairs)
    if len(values) != len(pairs):
        for name, value in pairs:
            if values[name] != value:
                raise ValueError(f"'{shown(name, plain=True)}' occurs twice, with different values")
    return values
