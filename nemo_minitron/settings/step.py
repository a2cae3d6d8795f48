"""One step of a chain, as plain values: how its student is cut, and what is set otherwise than in the job."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.parse import WORDS, shown
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.settings.search import Search
from nemo_minitron.settings.validated import ValidatedSettings

FIRST, PREVIOUS = "first", "previous"
TEACHERS = (FIRST, PREVIOUS)
TAKEN = (RunFolder.recipe, RunFolder.chain)  # in the chain's folder, beside a folder for each step
OPEN = ("calibration", "distillation")  # of a step: any setting of these groups


@dataclasses.dataclass(frozen=True)
class Step(ValidatedSettings):
    """One student of a chain: cut from the one before it (the first from the job's teacher), then distilled.

    `name` is its folder in the run folder. `keep`, `search` and `rounds` are as in a Job. `teacher`, of the
    distillation: first, the job's own, the largest along the chain, which the paper found better (2407.14679), or
    previous, the model that is cut. `calibration` and `distillation`: settings of those groups that this step has
    otherwise than the job, for example {"tokens": 2_000_000}.

    Raises InputError for a name that is no folder's and an unknown teacher.
    """

    name: str
    keep: Mapping[str, int] = dataclasses.field(default_factory=dict)
    search: Search = dataclasses.field(default_factory=Search)
    rounds: int = 1
    teacher: str = FIRST
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distillation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not WORDS.fullmatch(str(self.name)) or self.name in TAKEN:
            raise InputError(f"step {shown(self.name)} cannot name a folder; write letters, digits, '.', '_' and '-'")
        if self.teacher not in TEACHERS:
            raise InputError(f"teacher '{self.teacher}' is unknown; {nearest(self.teacher, TEACHERS)}")


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
