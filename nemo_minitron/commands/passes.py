"""A pass of text through a model: what settings, model and layout must agree on, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.commands.corpus import positions_of
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.fp8 import check_fp8, check_tokens

if TYPE_CHECKING:
    from nemo_minitron.artifacts.cache_settings import CacheSettings
    from nemo_minitron.settings.calibration import Calibration
    from nemo_minitron.settings.layout import Layout
    from nemo_minitron.sources.tensors import ModelSource


def fit_pass(source: ModelSource, settings: Calibration | CacheSettings, layout: Layout, rows: int) -> Fit:
    """The settings, fitted to the model. `rows`: of a micro-batch. Raises InputError if the model is too short for the
    sequences, if the layout divides neither, or if FP8 cannot multiply its sizes."""
    fit = Fit(settings, layout)
    fit.model(positions_of(source.config))
    length = fit.settings.sequence_length
    layout.check(source.architecture)
    layout.check_sequence(length)
    check_fp8(source.architecture, layout, settings.precision)
    check_tokens(length, rows, layout, settings.precision)
    return fit
