"""What all groups of settings check: whole numbers are in range, other numbers are finite, names are known."""

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
    """Settings that check themselves: whole numbers lie within the bounds of their fields, other numbers are finite and
    not negative, and names are legal. Raises InputError."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, known = getattr(self, field.name), described(field) or Setting("")
            if field.type == "int":
                check_whole(field.name, value, known.least, known.most)
            if field.type == "float | str" and isinstance(value, str) and value not in known.legal:
                names = ", ".join(known.legal)
                raise InputError(f"{field.name} is '{value}'; it must be a number, or {names}")
            if field.type == "float" or (field.type == "float | str" and not isinstance(value, str)):
                check_number(field.name, value, known.above_zero)
            elif known.legal and value not in known.legal:
                raise InputError(f"{field.name} '{value}' is unknown; {nearest(value, filter(None, known.legal))}")


def precision_setting(default: str, legal: Sequence[str] = PRECISIONS, **more: Any) -> Any:
    """The field of a precision. `auto` is decided before anything is loaded (`settings.precision`)."""
    return setting(default, f"Precision of the model: {', '.join(legal)}, or auto.", legal=(*legal, "auto"), **more)


def check_whole(name: str, value: int, least: int = 1, most: int = MOST) -> None:
    """Raises InputError, with the nearest legal value, for what is no whole number, or is out of range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if not least <= value <= most:
        raise InputError(f"{name} is {_short(value)}; the nearest legal value is {least if value < least else most}")


def check_number(name: str, value: float, above_zero: bool = False) -> None:
    """Raises InputError for NaN, an infinity, a number below 0, and for 0 if the number must be above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not _finite(value):
        raise InputError(f"{name} is {_short(value)}; it must be a finite number")
    if value < 0 or (value == 0 and above_zero):
        raise InputError(f"{name} is {value}; it must be {'above' if above_zero else 'at least'} 0")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def _short(value: object) -> str:
    """A number for a sentence. Python refuses to print more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a whole number of {value.bit_length()} bits"
    return str(value)
