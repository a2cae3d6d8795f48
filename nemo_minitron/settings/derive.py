"""Sizes that nobody asked for (`schema.Unasked`): if a default does not fit, a size that fits takes its place, and a
remark says so.

A value that somebody wrote is never changed here. The checks refuse it if it does not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from nemo_minitron.errors import InputError
from nemo_minitron.precisions import FP8, token_multiple
from nemo_minitron.schema import Unasked, asked_for
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Job


class Corpus(Protocol):
    """What is asked of a tokenised text (`data.Tokens`)."""

    tokens: int

    def samples(self, sequence_length: int) -> int: ...


class Fit:
    """Settings of a stage, fitted to its layout first, then to a model, a cache or a text as they become known.

    `settings` are the fitted ones, `remark` says what was derived.
    """

    def __init__(self, settings: Any, layout: Layout) -> None:
        self.settings, self.layout = settings, layout
        self._why: dict[str, str] = {}  # name of a derived setting -> the reason, for the remark
        self._fixed: set[str] = set()  # names of derived settings that nothing may change again
        if self._derivable("sequence_length") and settings.sequence_length % self._multiple():
            self.length(settings.sequence_length, "the layout must divide it")
        if self._derivable("global_batch_size"):
            self._batch()
        if self._derivable("min_learning_rate") and settings.min_learning_rate > settings.learning_rate:
            self._set("min_learning_rate", settings.learning_rate / 10, "a tenth of learning_rate")

    def model(self, positions: int | None) -> None:
        """Fits the sequence length to `positions`: the longest sequence, in tokens, that the model's config allows.
        Raises InputError if a longer one was asked for."""
        if not positions:
            return
        self.length(positions, "the model has no more positions")
        if self.settings.sequence_length > positions:
            multiple = self._multiple()
            legal = positions - positions % multiple
            cure = f"the nearest legal value is {legal}" if legal else f"the layout needs a multiple of {multiple}"
            raise InputError(
                f"sequence_length is {self.settings.sequence_length}, but the model has {positions} positions "
                f"(max_position_embeddings); {cure}"
            )

    def text(self, *corpora: Corpus) -> None:
        """Fits lengths and rows to `corpora`, the Tokens that are read. A row needs one token more, its last label."""
        self.length(min(corpus.tokens for corpus in corpora) - 1, "the text has no more tokens")
        rows = min(corpus.samples(self.settings.sequence_length + 1) for corpus in corpora)
        for name in ("samples", "depth_samples"):
            if self._derivable(name) and 0 < rows < getattr(self.settings, name):
                self._set(name, rows, "the text has no more rows")

    def exactly(self, length: int, why: str) -> None:
        """Sets the sequence length that something else, such as a cache, has. It does not give way any more."""
        if self._derivable("sequence_length") and length != self.settings.sequence_length:
            self._set("sequence_length", length, why)
        self._fixed.add("sequence_length")

    def length(self, most: int, why: str) -> None:
        """Sets the longest legal sequence length of at most `most` tokens, if the default is longer."""
        length = most - most % self._multiple()
        if self._derivable("sequence_length") and 0 < length < self.settings.sequence_length:
            # Nobody asked for this length, either: a model or a text may still make it shorter.
            self._set("sequence_length", Unasked(length), why)

    @property
    def remark(self) -> str:
        """What was derived, in one line; "" if every default fits."""
        return "; ".join(f"{name} is {getattr(self.settings, name)}, since {why}" for name, why in self._why.items())

    def _derivable(self, name: str) -> bool:
        """Whether nobody asked for this size, or it was derived before and is not fixed."""
        derived = name in self._why or not asked_for(getattr(self.settings, name, 0))
        return derived and name not in self._fixed

    def _set(self, name: str, value: int | float, why: str) -> None:
        self.settings, self._why[name] = dataclasses.replace(self.settings, **{name: value}), why

    def _multiple(self) -> int:
        """Sequence and context parallelism and FP8 need a sequence length that is a multiple of this."""
        layout = self.layout
        parts = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)
        precisions = [self.settings.precision, getattr(self.settings, "teacher_precision", "")]
        multiples = [token_multiple(FP8.get(precision), layout.tp if layout.sp else 1) for precision in precisions]
        return math.lcm(parts, *(layout.cp * multiple for multiple in multiples))

    def _batch(self) -> None:
        at_once = self.layout.pp if self.layout.vp > 1 else 1  # Megatron's interleaved schedule
        step = self.settings.micro_batch_size * self.layout.dp * at_once
        if self.settings.global_batch_size % step:
            size = max(1, round(self.settings.global_batch_size / step)) * step
            self._set("global_batch_size", size, f"a step takes {step} rows at a time, over all ranks")


def fit_job(job: Job) -> tuple[Job, str]:
    """(the job with the sizes that its layout derives, the remark). What depends on a model or a text is derived when
    that is read, so the recipe of a run does not change with them."""
    return _fitted(job, {name: Fit(getattr(job, name), job.layout) for name in ("calibration", "distillation")})


def fit_job_to_models(job: Job, positions: int | None) -> tuple[Job, str]:
    """(the job with the sequence lengths that its models allow, the remark). `positions`: as for `Fit.model`. Raises
    InputError for a longer sequence that was asked for."""
    layouts = {"calibration": job.layout, "distillation": job.layout, "evaluation": Layout(), "gates": Layout()}
    fits = {name: Fit(getattr(job, name), layout) for name, layout in layouts.items()}
    for name, fit in fits.items():
        try:
            fit.model(positions)
        except InputError as error:
            raise InputError(f"{name}.{error}") from None
    return _fitted(job, fits)


def _fitted(job: Job, fits: Mapping[str, Fit]) -> tuple[Job, str]:
    """The job with the settings of each group's fit, and one remark."""
    remark = "; ".join(f"{name}.{fit.remark.replace('; ', f'; {name}.')}" for name, fit in fits.items() if fit.remark)
    return dataclasses.replace(job, **{name: fit.settings for name, fit in fits.items()}), remark
