"""What a job's estimate stage must gather so that its plan can be made."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.search.rounds import round_sizes
from nemo_minitron.search.sizes import student_architecture
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.recipe import Job


def calibration_of(job: Job, source: Architecture) -> Calibration:
    """What a job's estimate stage gathers for its plan. Raises InputError for what the model or the plan refuse."""
    calibration = job.calibration
    for dropped in _dropped(job, source):
        calibration = calibration.for_plan(job.depth, dropped)
    calibration.check(source, job.layout)
    return calibration


def _dropped(job: Job, source: Architecture) -> list[int]:
    """How many layers the plan drops; of a search, what it may be; in rounds the first one's plan, if it drops any."""
    kept: Sequence[int] = [student_architecture(source, job.keep).num_layers]
    if job.search.wanted:
        kept = job.search.shapes(source, job.keep).sizes.get("layers", kept)
    whole = [source.num_layers - count for count in kept if count < source.num_layers] or [0]
    if job.rounds == 1 or whole == [0]:
        return whole
    first = student_architecture(source, round_sizes(source, job.keep, job.rounds)[0]).num_layers
    return [source.num_layers - first] if first < source.num_layers else []
