"""A list of whole numbers in a text that no shell reads as its own: `0+1+3-7`."""

from __future__ import annotations

import re

from nemo_minitron.errors import InputError

MOST = 100_000  # numbers in one list; no model has as many layers
_PARTS = re.compile(r"\s*\d{1,9}\s*(-\s*\d{1,9}\s*)?(\+\s*\d{1,9}\s*(-\s*\d{1,9}\s*)?)*", re.ASCII)


def numbers(text: str) -> list[int] | None:
    """`0+1+3-7` -> [0, 1, 3, 4, 5, 6, 7], in the order of the text; None for any other text, a mere number among them.

    The list of one number is written `3-3`. Raises InputError for a range whose ends are in the wrong order.
    """
    if not _PARTS.fullmatch(text) or text.strip().isdecimal():
        return None
    found: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise InputError(f"'{part.strip()}' in '{text}' runs backwards; write the lower number first, e.g. 3-7")
        if int(last or first) - int(first) >= MOST:
            raise InputError(f"'{part.strip()}' in '{text}' has too many numbers; legal are up to {MOST:,}")
        found += range(int(first), int(last or first) + 1)
    return found
