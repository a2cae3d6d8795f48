"""The estimate stage as NeMo runs it: statistics are `trainer.validate`, the criteria of depth follow on its model."""

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
    """The criteria of depth, on the model that `trainer.validate` ran."""

    def __init__(self, depth: DepthCriteria) -> None:
        self.depth = depth

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.depth.run(chunks_of(trainer))


def validate(estimation: Estimation, depth: DepthCriteria) -> None:
    """Activations of the rows that are left, by the `Importance` callback; `depth` runs at the end."""
    settings, layout, whole = estimation.calibration, estimation.layout, estimation.whole
    batches = -(-estimation.rows_left // whole)
    data = _data(estimation, estimation.done, settings.samples, batches * whole)
    trainer = make_trainer(
        layout, settings.precision, limit_val_batches=batches, logger=False, max_steps=1, enable_checkpointing=False
    )
    importance = Importance(
        None, settings.criteria, settings.norms, settings.statistics, estimation.save_every,
        str(estimation.statistics), estimation.before,
    )  # fmt: skip
    progress = Progress(settings.samples, settings.sequence_length, estimation.done, whole)
    fill = FillStudent(estimation.source)
    trainer.callbacks.extend([fill, importance, progress, DepthAfterwards(depth)])
    model = nemo_model(estimation.source.config, tokenizer=data.tokenizer, precision=settings.precision, layout=layout)
    trainer.validate(model, data, verbose=False)


def rows(estimation: Estimation, first: int, samples: int, length: int) -> Sequence[dict[str, Any]]:
    """As `megatron.estimate.Runner.rows`."""
    data = _data(estimation, first, samples, length)
    data.build(1, 1, length // estimation.whole, 0)
    return data._validation_ds


def _data(estimation: Estimation, first: int, samples: int, length: int) -> Any:
    """NeMo's data module over rows `first` to `samples`, filled up to `length` with rows that do not count.

    Raises InputError for a corpus that is too short.
    """
    settings, prefix = estimation.calibration, estimation.tokens.prefix
    estimation.tokens.windows(settings.sequence_length + 1, samples)
    module = data_module(
        prefix, prefix, tokenizer=str(estimation.source.folder), seed=settings.seed,
        sequence_length=settings.sequence_length, micro_batch_size=settings.batch_size,
        global_batch_size=estimation.whole, index_folder=estimation.order.work / "index",
    )  # fmt: skip
    module.dataset_cls = windowed(first, samples, length)
    return module
