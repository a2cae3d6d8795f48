"""What groups of a recipe's settings have in common: whole numbers count something, numbers are numbers, names are
known ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import PRECISIONS
from nemo_minitron.schema import MOST, Setting, described, setting


class ValidatedSettings:
    """Settings whose whole numbers lie between the bounds that their fields name, whose other numbers are finite and
    not negative, and whose names are legal ones."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, known = getattr(self, field.name), described(field) or Setting("")
            if field.type == "int":
                check_whole(field.name, value, known.least, known.most)
            if field.type == "float":
                check_number(field.name, value, known.above_zero)
            if known.legal and value not in known.legal:
                raise InputError(f"{field.name} '{value}' is unknown; {nearest(value, filter(None, known.legal))}")


def precision_setting(default: str, legal: Sequence[str] = PRECISIONS) -> Any:
    """The field of a precision; `auto` is decided before anything is loaded (`settings.precision`)."""
    return setting(default, f"{', '.join(legal)}, or auto.", legal=(*legal, "auto"))


def check_whole(name: str, value: int, least: int = 1, most: int = MOST) -> None:
    """Raises InputError, with the nearest legal value, for a whole number that nothing can have."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if not least <= value <= most:
        raise InputError(f"{name} is {_short(value)}; the nearest legal value is {least if value < least else most}")


def check_number(name: str, value: float, above_zero: bool = False) -> None:
    """Raises InputError for NaN, an infinity, and a number below 0, or 0 where it has to be above."""
    if not isinstance(value, Real) or isinstance(value, bool) or not _finite(value):
        raise InputError(f"{name} is {_short(value)}; it must be a finite number")
    if value < 0 or (value == 0 and above_zero):
        raise InputError(f"{name} is {value}; it must be {'above' if above_zero else 'at least'} 0")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float is near
        return False


def _short(value: Any) -> str:
    """A number for a sentence: Python refuses to print one of more than 4,300 digits."""
    long = isinstance(value, int) and value.bit_length() > 100
    return f"a whole number of {value.bit_length()} bits" if long else str(value)
