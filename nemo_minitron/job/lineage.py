"""A student that learns from an ancestor of the model that it is cut from, as in a chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, compose
from nemo_minitron.artifacts.run_folder import CutFolder
from nemo_minitron.distillation.layer_map import AUTO
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from nemo_minitron.settings.recipe import Job


def learned_from(job: Job) -> str:
    """The model whose outputs the student learns."""
    return job.learns_from or job.teacher


def plan_of_learned(job: Job, cut: CutFolder) -> Path | None:
    """The file of the plan that leads from the model that a student learns from to the student; None if it is unknown.

    Raises InputError for a lineage whose plans do not follow each other.
    """
    if not job.learns_from:
        return cut.plan
    if not job.lineage:
        return None
    composed = compose(*map(PrunePlan.load, job.lineage), PrunePlan.load(cut.plan))
    composed.save(cut.composed)
    return cut.composed


def check_lineage(job: Job, student: Architecture, source: Architecture, learned: Architecture) -> None:
    """Raises InputError if `learned`, the model that the student learns from, has another vocabulary than `source`, the
    model that is cut, if the plans do not lead from it to the source, and for intermediate states that need plans."""
    if not job.learns_from:
        if job.lineage:
            raise InputError("lineage leads from the model in learns_from to the teacher; set both or neither")
        return
    if learned.vocab_size != source.vocab_size:
        raise InputError(
            f"'{job.learns_from}' has {learned.vocab_size:,} tokens in its vocabulary and the student has "
            f"{source.vocab_size:,}; it must learn from a model with the same tokens"
        )
    if job.distillation.intermediate == AUTO and not job.lineage and student.num_layers != learned.num_layers:
        raise InputError(
            "intermediate=auto needs to know which layers of learns_from the student keeps; give lineage, the plans "
            "that made the model that is cut, or pairs of layers"
        )
    if job.lineage and all(Path(file).is_file() for file in job.lineage):
        _check_plans(job, source, learned)


def _check_plans(job: Job, source: Architecture, learned: Architecture) -> None:
    composed = compose(*map(PrunePlan.load, job.lineage))
    ends = ((job.learns_from, composed.source, learned), (job.teacher, composed.target, source))
    for model, sizes, expected in ends:
        if sizes != expected:
            raise InputError(
                f"the plans of lineage do not lead from '{job.learns_from}' to '{job.teacher}': '{model}' has "
                f"{expected.parameters():,} parameters, but the plans say {sizes.parameters():,}"
            )
