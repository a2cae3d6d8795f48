"""The prune stage of a checkpoint: the student, filled by reading, as a checkpoint of the same kind, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import atomic_folder
from nemo_minitron.errors import InputError
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.pruning.cut import save_record
from nemo_minitron.settings.orders import PruneOrder
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import TensorSource

PRECISIONS = {"F32": "fp32", "BF16": "bf16"}  # by the dtype that the teacher's weights are stored in


class Writer(Builder, Protocol):
    """What the stage asks of a host."""

    def save(self, chunks: list[Any], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        """Writes a live student into an empty folder as a checkpoint of its teacher's kind. Collective."""
        ...


def prune(order: PruneOrder, host: Writer) -> None:
    """Writes the plan's student to `order.out`.

    It is filled by reading the teacher, chunk by chunk, and the compensation, where one is given.
    """
    plan, source = PrunePlan.load(order.plan), open_source(order.model)
    solved = Compensation.load(order.compensation) if order.compensation else None
    student = load(source, plan, build=host.build, compensation=solved, precision=precision_of(source))
    with atomic_folder(order.out) as folder:
        host.save(student, folder, order.model, plan)
        save_record(folder, plan, solved)


def precision_of(source: TensorSource) -> str:
    """That of a source's weights. Raises InputError for one that checkpoints are not written in."""
    stored = source.dtype(next(iter(source.architecture.shapes())))
    if stored not in PRECISIONS:
        raise InputError(f"the teacher stores {stored}; NeMo's students are {' or '.join(PRECISIONS)}")
    return PRECISIONS[stored]
