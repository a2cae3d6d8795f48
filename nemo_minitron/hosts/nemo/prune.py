"""`minitron prune` of a NeMo checkpoint: the student as a checkpoint of the same kind, in one process."""

from __future__ import annotations

from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import atomic_folder
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import nemo_sizes
from nemo_minitron.pruning.cut import save_record
from nemo_minitron.settings.orders import PruneOrder

PRECISIONS = {"F32": "fp32", "BF16": "bf16"}  # by the dtype that the teacher's weights are stored in
KEPT = ("vocab_size", "share_embeddings_and_output_weights", "make_vocab_size_divisible_by")  # as the teacher has them


def prune(order: PruneOrder) -> None:
    """Writes the plan's student to `order.out` (weights/ and context/).

    It is filled by reading the teacher, chunk by chunk, and the compensation, where one is given; its context is the
    teacher's with other sizes, as data.
    """
    backend.setup()
    from megatron.core import dist_checkpointing

    from nemo_minitron.hosts.nemo.models import load_model
    from nemo_minitron.hosts.nemo.students import sharded_state
    from nemo_minitron.sources.checkpoint import CheckpointSource
    from nemo_minitron.sources.context import resize_context

    teacher, plan = order.model, PrunePlan.load(order.plan)
    source = CheckpointSource(teacher)
    solved = Compensation.load(order.compensation) if order.compensation else None
    student = load_model(teacher, plan, compensation=solved, precision=precision_of(source))
    sizes = {name: size for name, size in nemo_sizes(plan.target).items() if name not in KEPT}
    with atomic_folder(order.out) as folder:
        (folder / "weights").mkdir()
        state = {"state_dict": {}, "sharded_state_dict": sharded_state(student)}
        dist_checkpointing.save(state, str(folder / "weights"))
        resize_context(teacher / "context", folder / "context", sizes)
        save_record(folder, plan, solved)


def precision_of(source: Any) -> str:
    """That of a source's weights. Raises InputError for one that NeMo's checkpoints are not written in."""
    stored = source.dtype(next(iter(source.architecture.shapes())))
    if stored not in PRECISIONS:
        raise InputError(f"the teacher stores {stored}; NeMo's students are {' or '.join(PRECISIONS)}")
    return PRECISIONS[stored]
