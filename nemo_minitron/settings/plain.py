"""Plain values of a file or the command line -> dataclasses of settings, each value of its declared type."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import anything, checked, shown
from nemo_minitron.errors import InputError, nearest, unprintable
from nemo_minitron.schema import asked_for
from nemo_minitron.search.numbers import numbers
from nemo_minitron.settings.numbers import whole_number

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
V = TypeVar("V")
PLAIN = {  # name of a field's type -> the types of its values, and how a sentence names them
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
}


def build(cls: type[T], values: object, where: str = "") -> T:
    """An object of the dataclass `cls`; `where` is the key of its group. Raises InputError for an unknown key (with the
    nearest one), a value of another type, and a missing key."""
    if not isinstance(values, Mapping):
        raise InputError(_no_group(f"'{where}'" if where else "the recipe", values, get_type_hints(cls)))
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        if name not in hints:
            raise InputError(f"a recipe has no key '{key}'; {nearest(name, hints)}")
        kind = hints[name]
        arguments[name] = _value(kind, value, key)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in arguments
    ]
    if missing:
        raise InputError(f"the recipe lacks '{where + '.' if where else ''}{missing[0]}'")
    return cls(**arguments)


def _no_group(what: str, values: object, names: Iterable[str]) -> str:
    """The refusal of a value in the place of a group. `names`: the group's settings; none if it may have any."""
    have = "empty" if values is None else shown(values)
    legal = ", ".join(names) or "a name and a value each"
    return f"{what} is {have}; it must be a group of settings: {legal}"


def _value(kind: object, value: Any, key: str) -> Any:
    """A plain value as its declared type: int becomes float, a list a tuple, and one value a tuple of one."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, key)
    kind = (str if isinstance(value, str) else float) if kind == float | str else kind
    name = getattr(kind, "__name__", "")
    if name in PLAIN:
        types, words = PLAIN[name]
        value = _written_out(value) if name == "int" else value
        legal = isinstance(value, types) and (name == "bool" or not isinstance(value, bool))
        if not legal:
            raise InputError(f"'{key}' is {shown(value)}; it must be {words}")
        return _number(value, key) if name == "float" else _plain(value, key)
    if get_origin(kind) is tuple:
        return _sequence(get_args(kind)[0], value, key)
    if get_origin(kind) is Mapping:
        return _mapping(get_args(kind)[1], value, key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"'{key}' is {shown(value)}; it must be a text")
    return _plain(value, key)


def _written_out(value: object) -> object:
    """60k, 1e9 or 10_240 as the whole number; any other value as it is, a text of mere digits among them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    number = whole_number(value) if isinstance(value, str) and not value.isdecimal() else None
    return value if number is None else number


def _mapping(kind: object, value: object, key: str) -> JsonObject:
    """Names -> values of a kind. Values of any kind (`Any`) must be plain and not nested too deep."""
    if not isinstance(value, Mapping):
        raise InputError(_no_group(f"'{key}'", value, ()))
    if kind is Any:
        return checked(dict(value), anything(), f"'{key}'")
    values = {}
    for name, item in value.items():  # `keep.layers` may list the layers that stay, also as a text: 0+1+3-7
        listed = numbers(item) if kind is int and isinstance(item, str) else None
        item = item if listed is None else listed
        each = [_value(kind, one, f"{key}.{name}") for one in (item if isinstance(item, (list, tuple)) else [item])]
        values[_plain(name, key)] = each if isinstance(item, (list, tuple)) else each[0]
    return values


def _plain(value: V, key: str) -> V:
    """A value without control characters, since a text may be a path or be printed. Prompts may have several lines."""
    allowed = "\n\t" if key.rpartition(".")[2] == "prompts" else ""
    if isinstance(value, str) and any(unprintable(character) for character in value if character not in allowed):
        raise InputError(f"'{key}' is {shown(value)}; it must be a text without control characters")
    return value


def _number(value: int | float, key: str) -> float:
    """A number as a float; a default that can be derived keeps its class (`UnaskedRate`)."""
    if not asked_for(value):
        return value
    try:
        return float(value)
    except OverflowError:
        raise InputError(
            f"'{key}' is a whole number of {int(value).bit_length()} bits, which is too large for a float"
        ) from None


def _sequence(kind: object, value: object, key: str) -> tuple[object, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    items = [f"{key}.{number}" if dataclasses.is_dataclass(kind) else key for number in range(len(values))]
    return tuple(_value(kind, item, where) for item, where in zip(values, items, strict=True))
