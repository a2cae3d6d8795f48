"""The estimate stage as NeMo runs it: statistics are `trainer.validate`, the criteria of depth follow on its model."""

from __future__ import annotations

from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import Scores
from nemo_minitron.settings.calibration import SCANNED, STATISTICS, TAYLOR
from nemo_minitron.settings.orders import EstimateOrder


def estimate(order: EstimateOrder) -> None:
    """Leaves `work/statistics.safetensors` (Scores of the rows, without depth) and `work/depth.safetensors` (Scores
    with depth alone), and goes on from what it finds of them.
    """
    backend.setup()
    from nemo_minitron.hosts.nemo.depth import DepthCriteria
    from nemo_minitron.hosts.nemo.models import load_model

    stage = Stage(order)
    depth = DepthCriteria(stage.source, stage.calibration, stage.depth_batches, stage.work / SCANNED)
    if stage.rows_left and stage.calibration.method != TAYLOR:
        stage.validate(depth)
        return
    chunks = load_model(stage.model, precision=stage.calibration.precision, layout=stage.layout)
    if stage.rows_left:
        stage.differentiate(chunks)
    depth.run(chunks)


class Stage:
    """A calibration's rows, and what was done of them."""

    def __init__(self, order: EstimateOrder) -> None:
        from nemo_minitron.data import Tokens
        from nemo_minitron.sources.open import open_source

        self.calibration, self.layout = order.calibration, order.layout
        self.model, self.tokens, self.work = str(order.model), Tokens(order.data), order.work
        self.source = open_source(self.model)
        self.statistics = self.work / STATISTICS
        self.before = Scores.load(self.statistics) if self.statistics.exists() else None
        self.done = self.before.samples if self.before else 0
        stages = self.layout.pp if self.layout.vp > 1 else 1  # virtual stages want as many micro-batches
        self.whole = self.calibration.batch_size * self.layout.dp * stages
        self.save_every = max(1, self.calibration.save_every // self.whole)  # batches

    @property
    def rows_left(self) -> int:
        return self.calibration.samples - self.done if self.calibration.runs else 0

    def validate(self, depth: Any) -> None:
        """Activations of the rows that are left, by the `Importance` callback; `depth` runs at the end."""
        from nemo_minitron.hosts.nemo.callbacks import Importance
        from nemo_minitron.hosts.nemo.distill import FillStudent
        from nemo_minitron.hosts.nemo.models import nemo_model
        from nemo_minitron.hosts.nemo.progress import Progress
        from nemo_minitron.hosts.nemo.trainer import make_trainer

        settings, batches = self.calibration, -(-self.rows_left // self.whole)
        data = self.data(self.done, settings.samples, batches * self.whole)
        trainer = make_trainer(
            self.layout, settings.precision, limit_val_batches=batches, logger=False, max_steps=1,
            enable_checkpointing=False,
        )  # fmt: skip
        importance = Importance(
            None, settings.criteria, settings.norms, settings.statistics, self.save_every, str(self.statistics),
            self.before,
        )  # fmt: skip
        progress = Progress(settings.samples, settings.sequence_length, self.done, self.whole)
        trainer.callbacks.extend([FillStudent(self.model), importance, progress, depth])
        model = nemo_model(
            self.source.config, tokenizer=data.tokenizer, precision=settings.precision, layout=self.layout
        )
        trainer.validate(model, data, verbose=False)

    def differentiate(self, chunks: list[Any]) -> None:
        """Taylor scores of the rows that are left, saved as often."""
        import torch

        from nemo_minitron.hosts.nemo.callbacks import model_digest
        from nemo_minitron.hosts.nemo.progress import Rows
        from nemo_minitron.importance.forward import estimate as scores_of

        settings, scores = self.calibration, self.before
        first = torch.distributed.get_rank() == 0
        rows = Rows(settings.samples, settings.sequence_length, self.done) if first else None
        batches = self.batches(self.done, settings.samples)
        for start in range(0, len(batches), self.save_every):
            part = batches[start : start + self.save_every]
            new = scores_of(
                chunks, part, criterion=settings.criteria, norms=settings.norms, axes=settings.statistics, method=TAYLOR
            )
            new.model_digest = scores.model_digest if scores else model_digest(chunks, new.architecture)
            scores = scores.merge(new) if scores else new
            if rows is not None:
                scores.save(self.statistics)
                rows.to(scores.samples)

    def depth_batches(self) -> list[dict[str, Any]]:
        return self.batches(0, self.calibration.depth_samples)

    def batches(self, first: int, samples: int) -> list[dict[str, Any]]:
        """Rows `first` to `samples`: this data-parallel rank's micro-batches, as many on every rank."""
        import torch
        from megatron.core import parallel_state

        size, length = self.calibration.batch_size, -(-(samples - first) // self.whole) * self.whole
        data = self.data(first, samples, length)
        data.build(1, 1, length // self.whole, 0)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        starts = range(rank * size, length, ranks * size)
        rows = [[data._validation_ds[i] for i in range(start, start + size)] for start in starts]
        return [torch.utils.data.default_collate(batch) for batch in rows]

    def data(self, first: int, samples: int, length: int) -> Any:
        """NeMo's data module over rows `first` to `samples`, filled up to `length` with rows that do not count.

        Raises InputError for a corpus that is too short.
        """
        from nemo_minitron.hosts.nemo.data_module import data_module
        from nemo_minitron.hosts.nemo.dataset import windowed

        settings, prefix = self.calibration, self.tokens.prefix
        self.tokens.windows(settings.sequence_length + 1, samples)
        module = data_module(
            prefix, prefix, tokenizer=str(self.source.folder), seed=settings.seed,
            sequence_length=settings.sequence_length, micro_batch_size=settings.batch_size,
            global_batch_size=self.whole, index_folder=self.work / "index",
        )  # fmt: skip
        module.dataset_cls = windowed(first, samples, length)
        return module
