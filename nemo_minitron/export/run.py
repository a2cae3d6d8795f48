"""Reads the run folder of `minitron compress`; a file that is missing becomes None or an empty list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, PrunePlan, Scores
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.parse import grouped, listed, text
from nemo_minitron.artifacts.records import read_curve, read_numbers, read_samples
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError

CURVES = ("checkpoints/distilled/loss.csv", "student/loss.csv", "loss.csv")
CURVE_KEYS = ("step", "tokens", "loss")
RECIPE = grouped({}, {"chain": listed(grouped({"name": text()}))})


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The content of a run folder. `curve`: rows of loss.csv as numbers; `numbers`, `samples`: rows of the JSON
    files."""

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


def read_run(folder: str | Path) -> RunFiles:
    """Reads a run folder. Raises InputError if it is no run folder, or a file in it is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the run folder '{folder}' does not exist")
    if not any((folder / name).is_file() for name in ("recipe.json", "manifest.json")):
        raise InputError(
            f"'{folder}' is no run folder: it has neither recipe.json nor manifest.json; "
            "give the folder that `minitron compress` wrote"
        )
    file = folder / "recipe.json"
    recipe = read_json(file, "the recipe", RECIPE) if file.exists() else None
    _check_chain(folder, recipe)
    run = RunFiles(
        folder,
        recipe=recipe,
        manifest=Manifest.open(folder / "manifest.json") if (folder / "manifest.json").exists() else None,
        scores=Scores.load(folder / "scores.safetensors") if (folder / "scores.safetensors").exists() else None,
        plan=PrunePlan.load(folder / "plan.json") if (folder / "plan.json").exists() else None,
        numbers=read_numbers(folder / "numbers.json") if (folder / "numbers.json").exists() else (),
        curve=next((read_curve(folder / name, CURVE_KEYS) for name in CURVES if (folder / name).is_file()), ()),
        samples=read_samples(folder / "samples.json") if (folder / "samples.json").exists() else (),
    )
    if run.plan and run.scores and run.plan.source != run.scores.architecture:
        raise InputError(f"'{folder}': plan.json and scores.safetensors are of different models")
    return run


def _check_chain(folder: Path, recipe: Any) -> None:
    """Raises InputError for the folder of a chain: its steps have the reports."""
    steps = (recipe or {}).get("chain")
    if steps and not (folder / "manifest.json").exists():
        names = ", ".join(f"{folder}/{step['name']}" for step in steps)
        raise InputError(f"'{folder}' is the folder of a chain, whose steps have a report each; give one of {names}")
