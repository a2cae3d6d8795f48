"""The GPU-hours of a distillation, from its FLOPs and two assumptions: the speed of a GPU, and the share of it used."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.search.rank import going_on
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.search import Search

GPU, PEAK = "H100", 989e12  # dense bf16 FLOPs a second
MFU = 0.4  # model FLOPs utilisation: the share of PEAK that training reaches
BACKWARD = 2  # FLOPs of the backward pass, in forward passes


@dataclasses.dataclass(frozen=True)
class Compute:
    """FLOPs of all steps: the student's training, the teacher's forward passes, the teacher correction, and both of the
    first two for the candidates that a search distils."""

    student: int
    teacher: int
    correction: int
    search: int = 0

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.correction + self.search

    @property
    def gpu_hours(self) -> float:
        return self.total / (PEAK * MFU) / 3600

    def describe(self, processes: int) -> str:
        """GPU-hours in one line, with what they assume. A teacher in FP8 is counted at bf16's speed."""
        parts = ", ".join(f"{name} {flops:.2e}" for name, flops in dataclasses.asdict(self).items() if flops)
        return (
            f"GPU-hours: {hours(self.gpu_hours)}, {hours(self.gpu_hours / processes)} h on {processes} "
            f"GPU{'s' * (processes > 1)}: "
            f"{self.total:.2e} FLOPs ({parts}) at {PEAK / 1e12:.0f} TFLOPS ({GPU}, bf16) "
            f"and an assumed MFU of {MFU:.0%}"
        )


def hours(number: float) -> str:
    return f"{number:,.1f}" if number >= 0.1 else "less than 0.1"


def compute(
    student: Architecture, teacher: Architecture, settings: Distillation, search: Search | None = None
) -> Compute:
    """FLOPs of the student's forward and backward passes, and of the teacher's forward passes if it runs. Attention
    counts at the mean position.

    The candidates of a search count as if they had the student's sizes.
    """
    position = settings.sequence_length // 2
    of_student, of_teacher = student.flops_per_token(position), teacher.flops_per_token(position)
    tokens, runs = settings.steps * settings.tokens_per_step, settings.learns_from_teacher
    corrected = 0
    if settings.correction_tokens:
        corrected = settings.correction().steps * settings.tokens_per_step
    trained = 1 + BACKWARD
    flops = Compute(trained * of_student * tokens, of_teacher * tokens * runs, trained * of_teacher * corrected)
    if search is None or not search.wanted:
        return flops
    steps = candidate_steps(search) * settings.tokens_per_step
    return dataclasses.replace(flops, search=(trained * of_student + of_teacher * runs) * steps)


def candidate_steps(search: Search) -> int:
    """Steps of all candidates together; fewer of them continue after each round (`search.rank`)."""
    running, steps = search.distil, 0
    for _ in range(search.rounds):
        steps += running * search.steps // search.rounds
        running = going_on(running)
    return steps
