"""Reads the run folder of `minitron compress`; a file that is missing becomes None or an empty list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.artifacts import Manifest, PrunePlan, Scores
from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import JsonFields, JsonObject
from nemo_minitron.artifacts.parse import grouped, listed, text
from nemo_minitron.artifacts.records import BENCHMARKS, GATES, SPEED, TRAJECTORY, read_curve, read_numbers, read_samples
from nemo_minitron.artifacts.run_folder import RunFolder, TrainingFolder
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError

CURVE_KEYS = VALIDATION_KEYS = ("step", "tokens", "loss")
RECIPE = grouped({}, {"chain": listed(grouped({"name": text()}))})


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The content of a run folder. `curve`, `validation`: rows of loss.csv and validation.csv as numbers; `numbers`,
    `samples`: rows of the JSON files; `speed`: model -> what was timed; `benchmarks`: model -> task -> metric ->
    number; `gates`: what the gates of the cut found; `trajectory`: what was measured
    along the distillation."""

    folder: Path
    recipe: JsonObject | None = None
    manifest: Manifest | None = None
    scores: Scores | None = None
    plan: PrunePlan | None = None
    numbers: Sequence[JsonObject] = ()
    curve: Sequence[dict[str, float]] = ()
    samples: Sequence[JsonObject] = ()
    validation: Sequence[dict[str, float]] = ()
    speed: JsonFields = dataclasses.field(default_factory=dict)
    benchmarks: JsonFields = dataclasses.field(default_factory=dict)
    gates: JsonFields = dataclasses.field(default_factory=dict)
    trajectory: JsonFields = dataclasses.field(default_factory=dict)

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
    files = RunFolder(folder)
    if not files.recipe.is_file() and not files.manifest.is_file():
        raise InputError(
            f"'{folder}' is no run folder: it has neither recipe.json nor manifest.json; "
            "give the folder that `minitron compress` wrote"
        )
    recipe = read_json(files.recipe, "the recipe", RECIPE) if files.recipe.exists() else None
    _check_chain(files, recipe)
    run = RunFiles(
        folder,
        recipe=recipe,
        manifest=Manifest.open(files.manifest) if files.manifest.exists() else None,
        scores=Scores.load(files.scores) if files.scores.exists() else None,
        plan=PrunePlan.load(files.plan) if files.plan.exists() else None,
        numbers=read_numbers(files.numbers) if files.numbers.exists() else (),
        curve=next((read_curve(file, CURVE_KEYS) for file in _curves(files) if file.is_file()), ()),
        samples=read_samples(files.samples) if files.samples.exists() else (),
        validation=next((read_curve(f, VALIDATION_KEYS) for f in _curves(files, "validation") if f.is_file()), ()),
        speed=read_json(files.speed, "the speeds", SPEED) if files.speed.exists() else {},
        benchmarks=read_json(files.benchmarks, "the benchmarks", BENCHMARKS) if files.benchmarks.exists() else {},
        gates=read_json(files.gates, "the gates", GATES) if files.gates.exists() else {},
        trajectory=read_json(files.trajectory, "the trajectory", TRAJECTORY) if files.trajectory.exists() else {},
    )
    if run.plan and run.scores and run.plan.source != run.scores.architecture:
        raise InputError(f"'{folder}': plan.json and scores.safetensors are of different models")
    return run


def _curves(files: RunFolder, name: str = "losses") -> list[Path]:
    """Where the losses of the training may lie, the first one first; `name`: losses or validation."""
    return [getattr(TrainingFolder(place), name) for place in (files.distilled, files.student, files.path)]


def _check_chain(folder: RunFolder, recipe: JsonObject | None) -> None:
    """Raises InputError for the folder of a chain: its steps have the reports."""
    steps = (recipe or {}).get("chain")
    if steps and not folder.manifest.exists():
        names = ", ".join(f"{folder}/{step['name']}" for step in steps)
        raise InputError(f"'{folder}' is the folder of a chain, whose steps have a report each; give one of {names}")
