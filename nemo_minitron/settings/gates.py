"""The gates of a job: cheap checks of the cut, before anything is trained."""

from __future__ import annotations

import dataclasses

from nemo_minitron.precisions import WIDE
from nemo_minitron.schema import setting
from nemo_minitron.settings.validated import ValidatedSettings, precision_setting

JOB = "only a job has gates"


@dataclasses.dataclass(frozen=True)
class Gates(ValidatedSettings):
    """Checks of the cut on a few held-out rows, in transformers, before matrices are re-fitted or anything is trained.

    They stop the job if the cut is wrong (`job/stages/gates.py` says what each one compares). fp32 sees small faults; a
    model that fits a device only in bf16 takes bf16, with wider limits.
    """

    run: bool = setting(True, "Check the cut before training; false: as --skip-gates.", recipe_only=JOB)
    rows: int = setting(8, "Held-out rows that the gates read, at most.", recipe_only=JOB)
    sequence_length: int = setting(128, "Length of a row, in tokens.", derived=True, recipe_only=JOB)
    batch_size: int = setting(4, "Rows that are read at once.", recipe_only=JOB)
    precision: str = precision_setting("fp32", WIDE, recipe_only=JOB)
