"""One step of a chain, as plain values: how its student is cut, and what is set otherwise than in the job."""

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
TAKEN = (RunFolder.recipe, RunFolder.chain)  # in the chain's folder, beside a folder for each step
CHAIN = "a chain is a job of several steps"
OPEN = ("calibration", "distillation")  # of a step: any setting of these groups


@dataclasses.dataclass(frozen=True)
class Step(ValidatedSettings):
    """One student of a chain: cut from the one before it (the first from the job's teacher), then distilled.

    `keep`, `search` and `rounds` are as in a Job. `teacher`: first is the job's own, the largest
    along the chain, which the paper found better (2407.14679); previous is the model that is cut.
    `calibration` and `distillation`: settings of those groups that this step has otherwise than the
    job, for example {"tokens": 2_000_000}.

    Raises InputError for a name that is no folder's and an unknown teacher.
    """

    name: str = dataclasses.field(metadata=known_as("Its folder in the run folder.", recipe_only=CHAIN))
    keep: Mapping[str, int] = dataclasses.field(
        default_factory=dict, metadata=known_as("As of the job.", recipe_only=CHAIN)
    )
    search: Search = dataclasses.field(default_factory=Search)
    rounds: int = setting(1, "As of the job.", recipe_only=CHAIN)
    teacher: str = setting(FIRST, "Whom the student learns from.", legal=TEACHERS, recipe_only=CHAIN)
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


def check_chain(steps: Sequence[Step], alone: Mapping[str, Any]) -> None:
    """`alone`: keys of the job that belong to its steps -> whether they are set.

    Raises InputError for one that is, and for a name that two steps have.
    """
    names = [step.name for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two steps of the chain are named '{name}'; each has a folder of its own name")
    for key, given in alone.items():
        if steps and given:
            raise InputError(f"a chain's steps say what is cut and whom they learn from; take '{key}' out of the job")
