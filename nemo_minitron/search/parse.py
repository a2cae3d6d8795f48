"""From what a user writes about a search to numbers; each refusal says what to write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.precisions import ALIGN
from nemo_minitron.search.numbers import numbers
from nemo_minitron.search.space import Divisors

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
BYTES = {"": 1, **{f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}}
SECONDS = {"": Fraction(1), "S": Fraction(1), "MS": Fraction(1, 1000), "US": Fraction(1, 10**6)}
BYTES |= {f"{p}IB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}


def count(text: str, what: str) -> int:
    """`84M`, `8.27B`, `84000000` -> a whole number. Raises InputError; `what` names the option."""
    return int(_quantity(text, COUNTS, what, "84M or 8.27B"))


def share(text: str, of: int, what: str) -> str:
    """`0.7x` -> that share of `of` as a count; any other text is left as it is. Raises InputError for a share of 1 or
    more; `what` names the option."""
    match = re.fullmatch(r"(\d*\.?\d+)x", text.strip())
    if not match:
        return text
    if not 0 < Fraction(match[1]) < 1:
        raise InputError(f"{what}={text} is no smaller model; a share is above 0 and below 1, for example 0.7x")
    return str(round(Fraction(match[1]) * of))


def size_in_bytes(text: str, what: str) -> int:
    """`8GiB`, `8GB`, `512MiB` -> bytes. Raises InputError; `what` names the option."""
    return int(_quantity(text, BYTES, what, "8GiB or 500MB"))


def seconds(text: str, what: str) -> float:
    """`30ms`, `0.5s` -> seconds. Raises InputError; `what` names the option."""
    return float(_quantity(text, SECONDS, what, "30ms"))


def _quantity(text: str, units: Mapping[str, int | Fraction], what: str, example: str) -> Fraction:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units:
        raise InputError(f"{what}={text} is not a size; write for example {example}")
    return Fraction(match[1]) * units[match[2].upper()]


def tolerance(text: str) -> float:
    """`5%` or `0.05` -> 0.05. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not match:
        raise InputError(f"the tolerance '{text}' is not a share; write for example 5%")
    return float(Fraction(match[1]) / (100 if match[2] else 1))


def sizes(text: str, option: str = "--keep") -> dict[str, Any]:
    """`ffn=1024,layers=24` -> sizes by axis; `layers=0+1+3-7` -> the layers that stay. Raises InputError."""
    return {
        name: _whole(value, part, option, "ffn=1024,layers=24") if (listed := numbers(value)) is None else listed
        for name, value, part in _pairs(text, ",", option)
    }


def bounds(text: str) -> dict[str, tuple[int, int]]:
    """`ffn=512:1536,layers=20:30` -> least and largest size by axis. Raises InputError."""
    ends_of_axis = {}
    for name, value, part in _pairs(text, ",", "--bounds"):
        ends = value.split(":")
        if len(ends) != 2:
            raise InputError(f"'{part}' in --bounds has no two ends; write for example ffn=512:1536,layers=20:30")
        low, high = (_whole(end, part, "--bounds", "ffn=512:1536,layers=20:30") for end in ends)
        ends_of_axis[name] = (low, high)
    return ends_of_axis


def lists(text: str) -> dict[str, Sequence[int] | Sequence[Fraction]]:
    """`layers=29,30;ffn=2.5x,3x` -> sizes to try by axis, multiples of hidden as fractions. Raises InputError."""
    sizes_of_axis: dict[str, Sequence[int] | Sequence[Fraction]] = {}
    for name, value, part in _pairs(text, ";", "--space"):
        values = [_listed(item.strip(), part) for item in value.split(",")]
        sizes_of_axis[name] = values  # type: ignore[assignment]
    return sizes_of_axis


def _listed(item: str, part: str) -> int | Fraction:
    if re.fullmatch(r"\d+(\.\d+)?x", item):
        return Fraction(item[:-1])
    return _whole(item, part, "--space", "layers=29,30;ffn=2.5x,3x")


def divisors(text: str) -> Divisors:
    """`64`, `fp8`, `fp8=128`, `tp=8`, `hidden=128`, or several with commas. Raises InputError."""
    every, tp, of, local = 0, 1, {}, False
    for part in filter(None, map(str.strip, text.split(","))):
        name, separator, value = part.partition("=")
        if name.strip() == "fp8":
            every, local = _whole(value or str(ALIGN), part, "--divisors", "fp8 or fp8=128"), True
            if every % ALIGN or not every:
                near = max(1, round(every / ALIGN)) * ALIGN
                raise InputError(f"fp8={every} in --divisors is not a multiple of {ALIGN}; the nearest is {near}")
        elif not separator:
            every = _whole(part, part, "--divisors", "64,tp=8 or fp8")
        elif name.strip() == "tp":
            tp = _whole(value, part, "--divisors", "64,tp=8 or fp8")
        else:
            of[name.strip()] = _whole(value, part, "--divisors", "hidden=128,ffn=64")
    return Divisors(every, tp, of, local)


def _pairs(text: str, between: str, option: str) -> Iterator[tuple[str, str, str]]:
    seen: set[str] = set()
    for part in filter(None, map(str.strip, text.split(between))):
        name, separator, value = map(str.strip, part.partition("="))
        if not separator or not name or not value:
            raise InputError(f"'{part}' in {option} names no axis and size; write axis=size, for example ffn=1024")
        if name in seen:
            raise InputError(f"'{name}' is in {option} twice; give it once")
        seen.add(name)
        yield name, value, part


def _whole(value: str, part: str, option: str, example: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value.strip()):
        raise InputError(f"'{part}' in {option} is not a size; write axis=size, for example {example}")
    return int(value)
