"""The step's objective with a cache in the teacher's place: no teacher runs, and none of its logits are in memory.

Shapes (docs/shapes.md): B sequences, S positions of the sequence, W columns of the vocabulary on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.distillation.cache.losses import CachedTargets
from nemo_minitron.distillation.cache.teacher import CachedTeacher
from nemo_minitron.distillation.step import Objective, Parts, language_model_loss
from nemo_minitron.distillation.teacher import Batch, DataStep
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from nemo_minitron.importance.batches import Batch

TARGETS = "cached_targets"  # the key that `with_targets` adds to a micro-batch


@dataclasses.dataclass(frozen=True)
class CachedObjective(Objective):
    """logits_weight * the cache's loss + lm_weight * cross entropy.

    `cached`: its mode decides the loss, not `loss`. The first part has that loss's name in place of "logits".
    """

    cached: CachedTeacher | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        assert self.cached is not None
        return tuple(self.cached.loss_name if name == "logits" else name for name in super().parts)

    @property
    def cross_entropy_weight(self) -> float:
        return self.logits_weight

    top_k_kl_weight = cross_entropy_weight

    @property
    def fused(self) -> bool:
        return False

    def of_logits(self, student_BSW: Tensor, batch: Batch, teacher_BSW: Tensor | None) -> Parts:
        """The parts from the student's logits, which may be overwritten, and the targets that the batch can read."""
        assert self.cached is not None
        parts: Parts = {}
        if self.logits_weight:
            group = parallel_state.get_tensor_model_parallel_group()
            parts[self.cached.loss_name] = self.cached.loss(
                student_BSW, batch[TARGETS](), group=group, vocab_size=self.vocab_size, in_place=not self.lm_weight
            )
        if self.lm_weight:
            parts["lm"] = language_model_loss(student_BSW, batch["labels"], self.vocab_size)
        return parts


def with_targets(data_step: DataStep, cached: CachedTeacher) -> DataStep:
    """NeMo's data step. Its micro-batch can also read its targets: the cache finds a row by all of its tokens.

    Targets are read only when the loss is computed: earlier stages and validation do not need them. Reading raises
    InputError for a row that the cache does not have, and for packed samples.
    """

    def step(batches: Iterator[Batch]) -> Batch:
        item = next(batches)
        uncut = item[0] if isinstance(item, tuple) else item  # the data step cuts rows for context parallelism
        return data_step(iter([item])) | {TARGETS: lambda: _read(cached, uncut)}

    return step


def _read(cached: CachedTeacher, batch: Batch) -> CachedTargets:
    """This context-parallel rank's part of the targets, on the device of the logits."""
    if batch.get("cu_seqlens") is not None:
        raise InputError("a batch has packed samples (cu_seqlens); a logit cache knows rows of one sample each")
    targets = cached.targets(batch["tokens"], batch.get("epoch"))
    device = torch.cuda.current_device()
    fields = {field.name: getattr(targets, field.name) for field in dataclasses.fields(targets)}
    moved = {name: None if value is None else value.to(device) for name, value in fields.items()}
    return CachedTargets(**batch_on_this_cp_rank(moved))
