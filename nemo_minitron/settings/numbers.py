"""Whole numbers as people write them: 60k, 1e9, 10_240."""

from __future__ import annotations

import re
from fractions import Fraction

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
WRITTEN = re.compile(r"(\d{1,18}(?:_\d{3})*(?:\.\d{1,9})?)(?:e\+?(\d{1,2}))?([kmgbt]?)", re.IGNORECASE | re.ASCII)
EXAMPLES = "60000, 60k, 1e9 or 10_240"


def whole_number(text: str) -> int | None:
    """`60k`, `1.5M`, `1e9`, `10_240` or `-3` as a whole number; None for a text that is none."""
    sign, digits = (-1, text.strip()[1:]) if text.strip().startswith("-") else (1, text.strip())
    match = WRITTEN.fullmatch(digits)
    if match is None:
        return None
    value = Fraction(match[1].replace("_", "")) * 10 ** int(match[2] or 0) * UNITS.get(match[3].lower(), 1)
    return sign * int(value) if value.denominator == 1 else None
