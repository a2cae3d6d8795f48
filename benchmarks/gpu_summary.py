"""The summary of a `gpu_session.py` file, for a person who has no time: a line for each part, then what each found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

DONE, FAILED, LATE, BEGUN, NOT_RUN = "done", "failed", "timed out", "cut off", "not run"
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
LONGEST = 150  # letters of a line


def summary(result: dict[str, Any]) -> list[str]:
    """The lines: how many parts are done and on what, a table of the parts, and the numbers of each."""
    rows, machine = result["parts"], result.get("machine", {})
    count = sum(row["state"] == DONE for row in rows.values())
    on = machine.get("device") or machine.get("processor", "?")
    lines = [f"{count} of {len(rows)} parts done on {on}, {result.get('date', '?')}"]
    lines += [
        f"  {name:36}{row['state']:10}{_seconds(row)}{reason(row)}"[:LONGEST].rstrip() for name, row in rows.items()
    ]
    lines += [f"  {name:36}{'absent':10}{'':10}{why}" for name, why in result.get("not measured", {}).items()]
    for name, row in rows.items():
        found = [f"  {line}" for line in _found(row)]
        lines += ["", name, *found] if found else []
    return lines


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:6,.0f} s  " if "seconds" in row else " " * 10


def reason(row: dict[str, Any]) -> str:
    """Why a part is not done, or what its tests counted, in one line."""
    if "why" in row or row["state"] in (LATE, BEGUN):
        return row.get("why", "")
    counted = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?)=*$", row.get("end", ""), re.MULTILINE)
    if counted:
        return counted[-1].strip()
    lines = [line for line in row.get("end", "").splitlines() if line.strip()]
    return lines[-1].strip() if row["state"] == FAILED and lines else ""


def _found(row: dict[str, Any]) -> Iterator[str]:
    """The numbers of a part; a script without numbers shows the end of its output."""
    found = row.get("found")
    if found is None:
        if row["state"] in (FAILED, LATE, BEGUN) or "passed" not in reason(row):
            yield from row.get("end", "").splitlines()[-12:]
        return
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    if plain:
        yield from _wrapped(plain)
    for key, value in found.items():
        if isinstance(value, dict):
            first, *rest = _wrapped(value) or [""]
            yield f"{key}: {first}"
            yield from (f"    {line}" for line in rest)


def _wrapped(values: dict[str, Any]) -> list[str]:
    """`key value; key value` in lines that fit a screen."""
    lines = [""]
    for word in (f"{key} {shown(key, value)}" for key, value in values.items()):
        if lines[-1] and len(lines[-1]) + len(word) > LONGEST - 50:
            lines.append("")
        lines[-1] += f"; {word}" if lines[-1] else word
    return lines


def shown(key: str, value: Any) -> str:
    """A number in a form to read: bytes with a unit, yes and no, five digits; of a list its length."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "-"}[value]
    if key.startswith("bytes") and isinstance(value, (int, float)):
        return next((f"{value / size:,.2f} {unit}" for size, unit in UNITS if value >= size), f"{value} B")
    if isinstance(value, list):
        return f"({len(value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {shown(name, of)}" for name, of in value.items()) + "}"
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
