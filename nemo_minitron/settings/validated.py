"""What groups of a recipe's settings have in common: whole numbers count something, numbers are numbers, names are
known ones."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from typing import Any

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import PRECISIONS

LEGAL = {
    "norms": ("all", "layers"),
    "loss": ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl", "cosine", "mse"),
    "intermediate_loss": ("cosine", "mse"),
    "start": ("pruned", "random"),
    "teacher_precision": ("", *PRECISIONS),
}
FROM_ZERO = (
    "seed", "warmup_steps", "warmup_tokens", "remove", "correction_tokens", "correction_warmup_steps", "validate_every",
    "patience", "documents",
)  # fmt: skip
ABOVE_ZERO = ("learning_rate", "correction_learning_rate", "temperature")  # of numbers that are not whole
SEEDS = 2**32 - 1  # Megatron's data sets draw with a generator that takes no larger one
MOST = 2**31 - 1  # of what is counted: the largest that Megatron's index files can say
TOKENS = 10**15  # of a whole training; the largest published ones have 10**13 to 10**14
WHOLE_TRAININGS = ("tokens", "warmup_tokens", "correction_tokens")


class ValidatedSettings:
    """Settings whose whole numbers are at least 1, but for seeds and what may be left out, and no larger than anything
    can be; whose other numbers are finite and not negative."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "int":
                check_whole(field.name, value)
            if field.type == "float":
                check_number(field.name, value)
            if field.name in LEGAL and value not in LEGAL[field.name]:
                raise InputError(f"{field.name} '{value}' is unknown; {nearest(value, LEGAL[field.name])}")


def check_whole(name: str, value: int, least: int | None = None) -> None:
    """Raises InputError, with the nearest legal value, for a whole number that nothing can have."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if least is None:
        least = 0 if name in FROM_ZERO else 1
    most = SEEDS if name == "seed" else TOKENS if name in WHOLE_TRAININGS else MOST
    if not least <= value <= most:
        raise InputError(f"{name} is {_short(value)}; the nearest legal value is {least if value < least else most}")


def check_number(name: str, value: float) -> None:
    """Raises InputError for NaN, an infinity, and a number below 0, or 0 where it has to be above."""
    if not isinstance(value, Real) or isinstance(value, bool) or not _finite(value):
        raise InputError(f"{name} is {_short(value)}; it must be a finite number")
    if value < 0 or (value == 0 and name in ABOVE_ZERO):
        raise InputError(f"{name} is {value}; it must be {'above' if name in ABOVE_ZERO else 'at least'} 0")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float is near
        return False


def _short(value: Any) -> str:
    """A number for a sentence: Python refuses to print one of more than 4,300 digits."""
    long = isinstance(value, int) and value.bit_length() > 100
    return f"a whole number of {value.bit_length()} bits" if long else str(value)
