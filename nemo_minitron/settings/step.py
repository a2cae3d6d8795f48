"""One step of a chain, as plain values: how its student is cut, and which settings differ from the job's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.parse import WORDS, shown
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.schema import known_as, setting
from nemo_minitron.settings.search import Search
from nemo_minitron.settings.validated import ValidatedSettings

FIRST, PREVIOUS = "first", "previous"
TEACHERS = (FIRST, PREVIOUS)
TAKEN = (RunFolder.recipe, RunFolder.chain)  # files in the chain's folder, beside a folder for each step
CHAIN = "only a job has a chain"
OPEN = ("calibration", "distillation")  # groups of which a step may change any setting


@dataclasses.dataclass(frozen=True)
class Step(ValidatedSettings):
    """One student of a chain: it is cut from the student before it (the first from the job's teacher), then distilled.

    `keep`, `search` and `rounds` are as in a Job. `teacher`: first is the job's own teacher, the largest model of the
    chain, which the paper found better (2407.14679); previous is the model that is cut. `calibration` and
    `distillation`: the settings of those groups that differ from the job's, for example {"tokens": 2_000_000}.

    Raises InputError for a name that cannot be a folder's, and an unknown teacher.
    """

    name: str = dataclasses.field(
        metadata=known_as("Name of the step, and of its folder in the run folder.", recipe_only=CHAIN)
    )
    keep: Mapping[str, int] = dataclasses.field(
        default_factory=dict, metadata=known_as("As keep of the job.", recipe_only=CHAIN)
    )
    search: Search = dataclasses.field(default_factory=Search)
    rounds: int = setting(1, "As rounds of the job.", recipe_only=CHAIN)
    teacher: str = setting(
        FIRST,
        "The model that the student learns from: first (the job's teacher) or previous.",
        legal=TEACHERS,
        recipe_only=CHAIN,
    )
    calibration: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata=known_as("Settings that differ from the job's.", recipe_only=CHAIN)
    )
    distillation: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata=known_as("Settings that differ from the job's.", recipe_only=CHAIN)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not WORDS.fullmatch(str(self.name)) or self.name in TAKEN:
            raise InputError(f"step {shown(self.name)} cannot name a folder; write letters, digits, '.', '_' and '-'")


def check_chain(steps: Sequence[Step], alone: Mapping[str, bool]) -> None:
    """Raises InputError if two steps have one name, and if the job of a chain sets what belongs to its steps.

    `alone`: keys that belong to the steps of a chain -> whether the job sets them.
    """
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two steps of the chain are named '{name}'; each has a folder of its own name")
    for key, given in alone.items():
        if steps and given:
            raise InputError(
                f"in a chain each step says what is cut and which model teaches; take '{key}' out of the job"
            )
