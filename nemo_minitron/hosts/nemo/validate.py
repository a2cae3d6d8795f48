"""The estimate stage in NeMo: `trainer.validate` gathers the statistics; the criteria of depth then use its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.callbacks import Importance
from nemo_minitron.hosts.nemo.data_module import data_module
from nemo_minitron.hosts.nemo.distill import FillStudent
from nemo_minitron.hosts.nemo.models import nemo_model
from nemo_minitron.hosts.nemo.progress import Progress
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context, make_trainer
from nemo_minitron.megatron.dataset import windowed
from nemo_minitron.megatron.depth import DepthCriteria
from nemo_minitron.megatron.estimate import Estimation


class DepthAfterwards(Callback):
    """Computes the criteria of depth on the model that `trainer.validate` has run."""

    def __init__(self, depth: DepthCriteria) -> None:
        self.depth = depth

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.depth.run(chunks_of(trainer))


def validate(estimation: Estimation, depth: DepthCriteria) -> None:
    """Scores the rows that are left by the `Importance` callback and runs `depth` afterwards. As
    `hosts.protocol.Host.validate`."""
    settings, layout, rows_per_step = estimation.calibration, estimation.layout, estimation.rows_per_step
    batches = -(-estimation.rows_left // rows_per_step)
    data = _data(estimation, estimation.done, settings.samples, batches * rows_per_step)
    trainer = make_trainer(
        layout, settings.precision, limit_val_batches=batches, logger=False, max_steps=1, enable_checkpointing=False
    )
    importance = Importance(
        None, settings.criteria, settings.norms, settings.statistics, estimation.save_every,
        str(estimation.statistics), estimation.before,
    )  # fmt: skip
    progress = Progress(settings.samples, settings.sequence_length, estimation.done, rows_per_step)
    fill = FillStudent(estimation.source)
    trainer.callbacks.extend([fill, importance, progress, DepthAfterwards(depth)])
    model = nemo_model(estimation.source.config, tokenizer=data.tokenizer, precision=settings.precision, layout=layout)
    trainer.validate(model, data, verbose=False)


def rows(estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
    """The rows of NeMo's validation dataset. As `hosts.protocol.Host.rows`."""
    data = _data(estimation, first, samples, length)
    data.build(1, 1, length // estimation.rows_per_step, 0)
    return data._validation_ds


def _data(estimation: Estimation, first: int, samples: int, length: int) -> Any:
    """NeMo's data module over the rows `first` to `samples` - 1, then rows that do not count, `length` in all.

    Raises InputError if the corpus is too short.
    """
    settings, prefix = estimation.calibration, estimation.tokens.prefix
    estimation.tokens.check_rows(settings.sequence_length, samples)
    module = data_module(
        prefix, prefix, tokenizer=str(estimation.source.folder), seed=settings.seed,
        sequence_length=settings.sequence_length, micro_batch_size=settings.batch_size,
        global_batch_size=estimation.rows_per_step, index_folder=estimation.order.work / "index",
    )  # fmt: skip
    module.dataset_cls = windowed(first, samples, length)
    return module
