"""The estimate stage: it scores a model's units on a calibration's rows, then computes the criteria of depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core import parallel_state

from nemo_minitron.artifacts import Scores
from nemo_minitron.data import Tokens
from nemo_minitron.importance.forward import estimate as scores_of
from nemo_minitron.megatron.depth import DepthCriteria
from nemo_minitron.megatron.live import live_digest
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import counted, rows
from nemo_minitron.settings.calibration import SCANNED, STATISTICS, TAYLOR
from nemo_minitron.settings.orders import EstimateOrder
from nemo_minitron.sources.open import open_source

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_minitron.importance.batches import Batch


class Runner(Builder, Protocol):
    """What the stage asks of a host. `hosts/protocol.py` describes each method in full."""

    def rows(self, estimation: Estimation, first: int, samples: int, length: int) -> Sequence[Batch]:
        """The rows `first` to `samples` - 1 of the order's corpus, then rows that do not count, `length` in all."""
        ...

    def validate(self, estimation: Estimation, depth: DepthCriteria) -> None:
        """Scores the rows that are left, in the host's own validation loop, and runs `depth` at its end."""
        ...


def estimate(order: EstimateOrder, host: Runner) -> None:
    """Writes two files of Scores to `order.work`: `statistics.safetensors` (without depth) and `depth.safetensors`
    (depth alone). A run that was killed resumes from them. Collective.

    Raises InputError if the model or the text cannot be read, if the text is too short, or if the model cannot have
    this precision or layout.
    """
    estimation = Estimation(order, host)
    calibration = order.calibration
    depth = DepthCriteria(estimation.source, calibration, estimation.depth_batches, order.work / SCANNED)
    if estimation.rows_left and calibration.method != TAYLOR:
        host.validate(estimation, depth)
        return
    chunks = load(estimation.source, build=host.build, precision=calibration.precision, layout=order.layout)
    if estimation.rows_left:
        estimation.score(chunks)
    depth.run(chunks)


class Estimation:
    """A calibration's rows and how many of them are done.

    `before`: Scores of the rows that an earlier run has done, or None. `done`: their number. `rows_per_step`: rows of
    all ranks in one step. `save_every`: steps between two saved states.
    """

    def __init__(self, order: EstimateOrder, host: Runner) -> None:
        self.order, self.host = order, host
        self.calibration, self.layout = order.calibration, order.layout
        self.tokens, self.source = Tokens(order.data), open_source(order.model)
        self.statistics = order.work / STATISTICS
        self.before = Scores.load(self.statistics) if self.statistics.exists() else None
        self.done = self.before.samples if self.before else 0
        # Megatron's schedule of virtual stages needs at least as many micro-batches as there are pipeline stages.
        self.micro_batches = self.layout.pp if self.layout.vp > 1 else 1
        self.rows_per_step = self.calibration.batch_size * self.layout.dp * self.micro_batches
        self.save_every = max(1, self.calibration.save_every // self.rows_per_step)

    @property
    def rows_left(self) -> int:
        return self.calibration.samples - self.done if self.calibration.runs else 0

    def score(self, chunks: list[MegatronModule]) -> None:
        """Scores of the rows that are left, by the calibration's method. Rank 0 saves them every `save_every` steps.
        Collective."""
        settings, scores = self.calibration, self.before
        first = torch.distributed.get_rank() == 0
        batches, architecture = self.batches(self.done, settings.samples), self.source.architecture
        size = self.save_every * self.micro_batches
        with counted(chunks[0], self._reporting()):
            for start in range(0, len(batches), size):
                new = scores_of(
                    chunks, batches[start : start + size], criterion=settings.criteria, norms=settings.norms,
                    axes=settings.statistics, method=settings.method, architecture=architecture,
                )  # fmt: skip
                new.model_digest = scores.model_digest if scores else live_digest(chunks, new.architecture)
                scores = scores.merge(new) if scores else new
                if first:
                    scores.save(self.statistics)

    def _reporting(self) -> Callable[[int], None]:
        """A function of the forward passes of this rank's first chunk. On rank 0 it reports the rows that are done."""
        if torch.distributed.get_rank():
            return lambda passes: None
        samples, per_pass = self.calibration.samples, self.calibration.batch_size * self.layout.dp
        report = rows("calibration", samples, self.calibration.sequence_length, self.done)
        return lambda passes: report(min(samples, self.done + passes * per_pass), samples)

    def depth_batches(self) -> list[Batch]:
        """This data-parallel rank's micro-batches for the criteria of depth, as `batches`."""
        return self.batches(0, self.calibration.depth_samples)

    def batches(self, first: int, samples: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of the rows `first` to `samples` - 1; each rank has as many.

        A micro-batch has the keys of `Host.rows`, each [batch_size, sequence_length].
        """
        size, length = self.calibration.batch_size, -(-(samples - first) // self.rows_per_step) * self.rows_per_step
        dataset = self.host.rows(self, first, samples, length)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        starts = range(rank * size, length, ranks * size)
        rows = [[dataset[i] for i in range(start, start + size)] for start in starts]
        return [torch.utils.data.default_collate(batch) for batch in rows]
