"""The run folder of `minitron compress`, read: what is there, and None or nothing for what is not."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, PrunePlan, Scores
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError

CURVES = ("checkpoints/distilled/loss.csv", "student/loss.csv", "loss.csv")
CURVE_KEYS = ("step", "tokens", "loss")
NUMBER_KEYS = ("stage", "corpus", "tokens", "parameters", "loss", "perplexity", "bits_per_byte", "seconds")
COUNTED = ("tokens", "parameters", "loss", "perplexity", "seconds")  # what figures and tables reckon with
SAMPLE_KEYS = ("stage", "prompt", "text")


@dataclasses.dataclass(frozen=True)
class Run:
    """`curve`: rows of loss.csv as numbers; `numbers`, `samples`: rows of the JSON files of these names."""

    folder: Path
    recipe: Any = None
    manifest: Manifest | None = None
    scores: Scores | None = None
    plan: PrunePlan | None = None
    numbers: Sequence[dict[str, Any]] = ()
    curve: Sequence[dict[str, float]] = ()
    samples: Sequence[dict[str, Any]] = ()

    def cuts(self, name: str) -> bool:
        """Whether the plan makes axis `name` smaller."""
        if self.plan is None:
            return False
        return AXES[name].length(self.plan.source) != AXES[name].length(self.plan.target)


def read_run(folder: str | Path) -> Run:
    """Raises InputError for what is no run folder, and for a file in it that is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the run folder '{folder}' does not exist")
    if not any((folder / name).is_file() for name in ("recipe.json", "manifest.json")):
        raise InputError(
            f"'{folder}' is no run folder: it has neither recipe.json nor manifest.json; "
            "give the folder that `minitron compress` wrote"
        )
    recipe = _json(folder / "recipe.json", "the recipe")
    _check_chain(folder, recipe)
    run = Run(
        folder,
        recipe=recipe,
        manifest=_manifest(folder / "manifest.json"),
        scores=Scores.load(folder / "scores.safetensors") if (folder / "scores.safetensors").exists() else None,
        plan=PrunePlan.load(folder / "plan.json") if (folder / "plan.json").exists() else None,
        numbers=_numbers(folder / "numbers.json"),
        curve=next((_curve(folder / name) for name in CURVES if (folder / name).is_file()), ()),
        samples=_rows(folder / "samples.json", SAMPLE_KEYS),
    )
    if run.plan and run.scores and run.plan.source != run.scores.architecture:
        raise InputError(f"'{folder}': plan.json and scores.safetensors are of different models")
    return run


def _check_chain(folder: Path, recipe: Any) -> None:
    """Raises InputError for the folder of a chain, whose steps have the reports."""
    steps = recipe.get("chain") if isinstance(recipe, dict) else None
    if steps and not (folder / "manifest.json").exists():
        names = ", ".join(f"{folder}/{step['name']}" for step in steps)
        raise InputError(f"'{folder}' is the folder of a chain, whose steps have a report each; give one of {names}")


def _json(path: Path, what: str) -> Any:
    return read_json(path, what) if path.exists() else None


def _manifest(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        manifest = Manifest.open(path)
        legal = all(isinstance(s["name"], str) and s["seconds"] >= 0 for s in manifest.stages)
        legal = legal and isinstance(manifest.versions, dict) and isinstance(manifest.digests, dict)
    except (AttributeError, KeyError, TypeError):
        legal = False
    if not legal:
        raise InputError(f"'{path}' is no manifest of versions, digests and stages")
    return manifest


def _numbers(path: Path) -> list[dict[str, Any]]:
    rows = _rows(path, NUMBER_KEYS)
    for row in rows:
        for key in COUNTED:
            if not isinstance(row[key], int | float) or not math.isfinite(row[key]):
                raise InputError(f"'{path}': '{key}' of stage '{row['stage']}' is {row[key]!r}, not a finite number")
    return rows


def _rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    rows = _json(path, f"the file of {path.stem}")
    if rows is None:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"'{path}' must hold a list of objects")
    for row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            raise InputError(f"'{path}': a row has no '{missing[0]}'; it needs {', '.join(keys)}")
    return rows


def _curve(path: Path) -> list[dict[str, float]]:
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [{key: float(row[key]) for key in CURVE_KEYS} for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}' is no loss curve of columns {', '.join(CURVE_KEYS)} ({error})") from None
