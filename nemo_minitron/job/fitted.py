"""A job's settings, fitted to the texts that its stages read. The job itself keeps the sizes of its recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Job

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens


def fitted_calibration(job: Job, source: Architecture, tokens: Tokens) -> Fit:
    """The calibration of a job, fitted to its text. Raises InputError as `calibration_of`."""
    fit = Fit(calibration_of(job, source), job.layout)
    fit.text(tokens)
    return fit


def fitted_distillation(job: Job, layout: Layout, *texts: Tokens) -> Fit:
    """The distillation of a job in this layout, fitted to the texts, or to a cache of logits in the teacher's place."""
    fit = Fit(job.distillation, layout)
    if job.distillation.teacher_cache:
        cache = CacheHeader.load(job.distillation.teacher_cache)
        fit.exactly(cache.settings.sequence_length, "the cache's rows have this length")
    else:
        fit.text(*texts)
    return fit
