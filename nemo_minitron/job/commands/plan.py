"""Scores -> PrunePlan."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.errors import InputError


def sizes(text: str) -> dict[str, int]:
    """`ffn=1024,layers=24` -> sizes by axis. Raises InputError."""
    found = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value.strip().isdigit():
            raise InputError(f"'{part}' in --keep is no size; write axis=size, for example ffn=1024,layers=24")
        found[name.strip()] = int(value)
    return found


def run_plan(scores: Path, keep: str, baseline: str = "", seed: int = 0) -> PrunePlan:
    """A plan of scores, or a baseline for it: `random` (seeded) or `least` important. Raises InputError."""
    from nemo_minitron.search import plan, random_plan

    known = Scores.load(scores)
    if baseline not in ("", "random", "least"):
        raise InputError(f"baseline '{baseline}' is unknown; legal are random and least")
    if baseline == "random":
        return random_plan(known.architecture, keep=sizes(keep), seed=seed)
    return plan(known, keep=sizes(keep), least=baseline == "least")
