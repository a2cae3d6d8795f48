"""The prune stage for a checkpoint. It runs in one process and writes the student as a checkpoint of the
host that it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import atomic_folder
from nemo_minitron.errors import InputError
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.pruning.cut import save_record
from nemo_minitron.settings.orders import PruneOrder
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import TensorSource

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

PRECISIONS = {"F32": "fp32", "BF16": "bf16"}  # the dtype of the teacher's stored weights -> the student's precision


class Writer(Builder, Protocol):
    """What the stage asks of a host. `hosts/protocol.py` describes each method in full."""

    def save(self, chunks: list[MegatronModule], folder: Path, teacher: Path, plan: PrunePlan) -> None:
        """Writes a live student to an empty folder, as a checkpoint of this host. Collective."""
        ...


def prune(order: PruneOrder, host: Writer) -> None:
    """Writes the plan's student to `order.out`. Its tensors are read from the teacher, chunk by chunk, and from the
    compensation if there is one.

    Raises InputError if the teacher, the plan or the compensation cannot be read, or if they do not belong together.
    """
    plan, source = PrunePlan.load(order.plan), open_source(order.model)
    solved = Compensation.load(order.compensation) if order.compensation else None
    student = load(source, plan, build=host.build, compensation=solved, precision=precision_of(source))
    with atomic_folder(order.out) as folder:
        host.save(student, folder, order.model, plan)
        save_record(folder, plan, solved)


def precision_of(source: TensorSource) -> str:
    """The precision in which a source stores its weights. Raises InputError if checkpoints cannot have it."""
    stored = source.dtype(next(iter(source.architecture.shapes())))
    if stored not in PRECISIONS:
        raise InputError(f"the teacher stores {stored}; a checkpoint's students are {' or '.join(PRECISIONS)}")
    return PRECISIONS[stored]
