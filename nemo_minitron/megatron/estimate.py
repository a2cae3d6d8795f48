"""The estimate stage: statistics of a calibration's rows, then the criteria of depth on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state

from nemo_minitron.artifacts import Scores
from nemo_minitron.data import Tokens
from nemo_minitron.importance.forward import estimate as scores_of
from nemo_minitron.megatron.depth import DepthCriteria
from nemo_minitron.megatron.live import live_digest
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import Rows
from nemo_minitron.settings.calibration import SCANNED, STATISTICS, TAYLOR
from nemo_minitron.settings.orders import EstimateOrder
from nemo_minitron.sources.open import open_source


class Runner(Builder, Protocol):
    """What the stage asks of a host."""

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
        """Rows `first` to `samples` of the order's corpus, filled up to `length` with rows that do not count."""
        ...

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        """Activations of the rows that are left, in the host's own validation; `depth` runs at its end."""
        ...


def estimate(order: EstimateOrder, host: Runner) -> None:
    """Leaves `work/statistics.safetensors` (Scores of the rows, without depth) and `work/depth.safetensors` (Scores
    with depth alone), and goes on from what it finds of them."""
    estimation = Estimation(order, host)
    calibration = order.calibration
    depth = DepthCriteria(estimation.source, calibration, estimation.depth_batches, order.work / SCANNED)
    if estimation.rows_left and calibration.method != TAYLOR:
        host.validate(estimation, depth)
        return
    chunks = load(estimation.source, build=host.build, precision=calibration.precision, layout=order.layout)
    if estimation.rows_left:
        estimation.differentiate(chunks)
    depth.run(chunks)


class Estimation:
    """A calibration's rows, and what was done of them. `whole`: rows of all ranks in one step."""

    def __init__(self, order: EstimateOrder, host: Runner) -> None:
        self.order, self.host = order, host
        self.calibration, self.layout = order.calibration, order.layout
        self.tokens, self.source = Tokens(order.data), open_source(order.model)
        self.statistics = order.work / STATISTICS
        self.before = Scores.load(self.statistics) if self.statistics.exists() else None
        self.done = self.before.samples if self.before else 0
        stages = self.layout.pp if self.layout.vp > 1 else 1  # virtual stages want as many micro-batches
        self.whole = self.calibration.batch_size * self.layout.dp * stages
        self.save_every = max(1, self.calibration.save_every // self.whole)  # batches

    @property
    def rows_left(self) -> int:
        return self.calibration.samples - self.done if self.calibration.runs else 0

    def differentiate(self, chunks: list[Any]) -> None:
        """Taylor scores of the rows that are left, saved as often."""
        settings, scores = self.calibration, self.before
        first = torch.distributed.get_rank() == 0
        rows = Rows(settings.samples, settings.sequence_length, self.done) if first else None
        batches = self.batches(self.done, settings.samples)
        for start in range(0, len(batches), self.save_every):
            part = batches[start : start + self.save_every]
            new = scores_of(
                chunks, part, criterion=settings.criteria, norms=settings.norms, axes=settings.statistics, method=TAYLOR
            )
            new.model_digest = scores.model_digest if scores else live_digest(chunks, new.architecture)
            scores = scores.merge(new) if scores else new
            if rows is not None:
                scores.save(self.statistics)
                rows.to(scores.samples)

    def depth_batches(self) -> list[dict[str, Any]]:
        return self.batches(0, self.calibration.depth_samples)

    def batches(self, first: int, samples: int) -> list[dict[str, Any]]:
        """Rows `first` to `samples`: this data-parallel rank's micro-batches, as many on every rank."""
        size, length = self.calibration.batch_size, -(-(samples - first) // self.whole) * self.whole
        data = self.host.rows(self, first, samples, length)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        starts = range(rank * size, length, ranks * size)
        rows = [[data[i] for i in range(start, start + size)] for start in starts]
        return [torch.utils.data.default_collate(batch) for batch in rows]
