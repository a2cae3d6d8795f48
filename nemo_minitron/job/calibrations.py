"""What a job's estimate stage must gather so that its plan can be made."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.search.rounds import round_sizes
from nemo_minitron.search.sizes import student_architecture
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.recipe import Job


def calibration_of(job: Job, source: Architecture) -> Calibration:
    """The calibration of a job, extended by what its plan needs. Raises InputError if model or plan refuse it."""
    calibration = job.calibration
    for dropped in _dropped_layers(job, source):
        calibration = calibration.for_plan(job.depth, dropped)
    calibration.check(source, job.layout)
    return calibration


def _dropped_layers(job: Job, source: Architecture) -> list[int]:
    """Numbers of layers that the plan may drop: one, or several in a search. In rounds it is the number of the first
    round, or no number if that round drops no layers."""
    kept: Sequence[int] = [student_architecture(source, job.keep).num_layers]
    if job.search.wanted:
        kept = job.search.shapes(source, job.keep).sizes.get("layers", kept)
    in_one_cut = [source.num_layers - count for count in kept if count < source.num_layers] or [0]
    if job.rounds == 1 or in_one_cut == [0]:
        return in_one_cut
    first = student_architecture(source, round_sizes(source, job.keep, job.rounds)[0]).num_layers
    return [source.num_layers - first] if first < source.num_layers else []
