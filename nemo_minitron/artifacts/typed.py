"""Frozen dataclasses <-> JSON: what goes in comes out, and every name and type is checked on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TypeVar, get_args, get_origin, get_type_hints

from nemo_minitron.artifacts.json_types import Json
from nemo_minitron.artifacts.parse import Kind, Wrong, checked, flag, inside, listed, maybe, number
from nemo_minitron.errors import nearest

T = TypeVar("T")


def plain(value: object) -> Json:
    """A dataclass as the plain values that JSON has; a path becomes a text, a tuple a list."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def typed(cls: type[T], values: object, what: str) -> T:
    """The dataclass of `plain`'s values. Raises InputError, in whose sentence `what` names the file, for a key that
    the class does not have, for one that is missing, and for a value of another type."""
    return checked(values, _record(cls), what)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise Wrong(value, "a whole number")
    return value


def _text(value: object, legal: str = "a text") -> str:
    if not isinstance(value, str):  # it may name a file, whose name need not be UTF-8
        raise Wrong(value, legal)
    return value


def _path(value: object) -> Path:
    return Path(_text(value, "a path"))


_PLAIN: dict[object, Kind] = {int: _whole, float: number(), str: _text, bool: flag, Path: _path}


def _record(cls: type[T]) -> Kind[T]:
    """The kind of a dataclass; a field with a default may be missing."""
    fields, hints = dataclasses.fields(cls), get_type_hints(cls)  # type: ignore[arg-type]
    kinds = {field.name: _kind(hints[field.name]) for field in fields}
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]

    def kind(value: object) -> T:
        if not isinstance(value, dict):
            raise Wrong(value, "an object")
        for name in value:
            if name not in kinds:
                raise Wrong(name, f"a key that is known here; {nearest(str(name), kinds)}")
        for name in needed:
            if name not in value:
                raise Wrong(value, f"an object with '{name}'")
        return cls(**{name: inside(kinds[name], item, name) for name, item in value.items()})

    return kind


def _kind(hint: object) -> Kind:
    """What a field's type takes."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType and len(inner) == 2 and inner[1] is NoneType:
        return maybe(_kind(inner[0]))
    if hint == float | str:
        return lambda value: _PLAIN[str if isinstance(value, str) else float](value)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        items = listed(_kind(inner[0]))
        return lambda value: tuple(items(value))
    if origin is Mapping:
        return _mapping(_kind(inner[0]), _kind(inner[1]))
    raise TypeError(f"no kind for a field of type {hint}")


def _mapping(name: Kind, item: Kind) -> Kind:
    def kind(value: object) -> dict[object, object]:
        if not isinstance(value, dict):
            raise Wrong(value, "an object")
        return {name(key): inside(item, held, key) for key, held in value.items()}

    return kind
