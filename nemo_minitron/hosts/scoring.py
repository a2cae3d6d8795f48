"""The scores of a user's own evaluation, gathered while a host runs it: what the callbacks of both hosts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores
from nemo_minitron.importance.collector import Collector
from nemo_minitron.importance.forward import architecture_of
from nemo_minitron.importance.reduction import reduce
from nemo_minitron.megatron.groups import current_layout
from nemo_minitron.megatron.live import live_digest
from nemo_minitron.search.sizes import target_of
from nemo_minitron.settings.layout import Layout


def student_layout(chunk: Any, target: Architecture) -> Layout:
    """The layout of the running job for a student of `target`'s sizes, which may have another number of layers.
    `chunk`: a live one of the teacher. Raises InputError if the student cannot run in it."""
    layout = current_layout(sp=chunk.config.sequence_parallel).for_depth(target.num_layers)
    layout.check(target)
    return layout


def check_student(chunk: Any, keep: Mapping[str, int]) -> None:
    """Raises InputError if a running model cannot be cut to these sizes, or if the student cannot run in its layout."""
    architecture = architecture_of(chunk)
    hybrid.check_stage(architecture.hybrid_pattern, "writing a checkpoint")
    student_layout(chunk, target_of(architecture, keep))


class Gathering:
    """Opens a Collector on the chunks of a running model, and merges what it gathers into `scores`.

    `criteria`, `norms`, `axes`, `previous`: those of the callback. Every method is collective. The hooks are removed by
    `close`, which may be called again.
    """

    def __init__(
        self, chunks: Sequence[Any], criteria: Sequence[str], norms: str, axes: Sequence[str] | None,
        previous: Scores | None = None,
    ) -> None:  # fmt: skip
        self.chunks, self.criteria, self.norms, self.axes = list(chunks), criteria, norms, axes
        self.scores, self.batches = previous, 0
        self._digest = live_digest(self.chunks, architecture_of(self.chunks[0]))
        self.collector = self.open()

    def open(self) -> Collector:
        """A new Collector. Raises InputError if it refuses the model."""
        self.collector = Collector(self.chunks, architecture_of(self.chunks[0]), self.criteria, self.axes).__enter__()
        return self.collector

    def merge(self) -> None:
        """Merges what the collector has gathered into `scores`, and closes the collector."""
        self.close()
        if not self.batches:
            return
        self.batches, new = 0, reduce(self.collector, self.norms)
        new.model_digest = self._digest
        if self.scores is not None:
            new.notes, new.data_digest = self.scores.notes, self.scores.data_digest
            new = self.scores.merge(new)
        self.scores = new

    def close(self) -> None:
        self.collector.__exit__()

    def save(self, path: str | None) -> None:
        """Rank 0 writes the scores to `path`, if there is a path."""
        if path and self.scores is not None and torch.distributed.get_rank() == 0:
            self.scores.save(path)
