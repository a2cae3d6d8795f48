"""What a distillation costs in GPU-hours, from its FLOPs and two assumptions, which the line that tells it names."""

from __future__ import annotations

import dataclasses

from nemo_minitron.architecture import Architecture
from nemo_minitron.search.rank import going_on
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.search import Search

GPU, PEAK = "H100", 989e12  # FLOPs a second in bf16, dense
MFU = 0.4  # the share of them that training reaches
BACKWARD = 2  # times the forward pass


@dataclasses.dataclass(frozen=True)
class Compute:
    """FLOPs of all steps: of the student's training, the teacher's forward passes, its correction before, and both of
    all candidates that a search distils."""

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

    def words(self, processes: int) -> str:
        """In a line, with what it assumes; a teacher in FP8 is counted at bf16's speed."""
        parts = ", ".join(f"{name} {flops:.2e}" for name, flops in dataclasses.asdict(self).items() if flops)
        return (
            f"GPU-hours: {self.gpu_hours:,.1f}, {self.gpu_hours / processes:,.1f} h on {processes} GPUs: "
            f"{self.total:.2e} FLOPs ({parts}) at {PEAK / 1e12:.0f} TFLOPS ({GPU}, bf16) "
            f"and an assumed MFU of {MFU:.0%}"
        )


def compute(
    student: Architecture, teacher: Architecture, settings: Distillation, search: Search | None = None
) -> Compute:
    """Forward and backward of the student, forward of the teacher where it runs; attention at the mean position.

    Candidates of a search count as if they had the student's sizes.
    """
    position = settings.sequence_length // 2
    ours, theirs = student.flops_per_token(position), teacher.flops_per_token(position)
    tokens, runs = settings.steps * settings.tokens_per_step, settings.learns_from_teacher
    corrected = 0
    if settings.correction_tokens:
        corrected = settings.correction().steps * settings.tokens_per_step
    trained = 1 + BACKWARD
    found = Compute(trained * ours * tokens, theirs * tokens * runs, trained * theirs * corrected)
    if search is None or not search.wanted:
        return found
    steps = candidate_steps(search) * settings.tokens_per_step
    return dataclasses.replace(found, search=(trained * ours + theirs * runs) * steps)


def candidate_steps(search: Search) -> int:
    """Steps of all candidates, fewer of which go on after each round (`search.rank`)."""
    running, steps = search.distil, 0
    for _ in range(search.rounds):
        steps += running * search.steps // search.rounds
        running = going_on(running)
    return steps
