"""The step's objective with a cache in the teacher's place: no teacher runs, no logits of one are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from nemo_minitron.distillation.cache.losses import CachedTargets
from nemo_minitron.distillation.cache.teacher import CachedTeacher
from nemo_minitron.distillation.step import Objective, Parts, language_model_loss
from nemo_minitron.errors import InputError

TARGETS = "cached_targets"  # what `with_targets` puts into a micro-batch


@dataclasses.dataclass(frozen=True)
class CachedObjective(Objective):
    """logits_weight * the cache's loss + lm_weight * cross entropy; the first part is called what it is.

    `cached` is a CachedTeacher, whose mode, and not `loss`, says which loss it is.
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

    def of_logits(self, student: Tensor, batch: dict[str, Any], teacher: Tensor | None) -> Parts:
        """From logits [B, S, V/tp], which are spent, and the targets that the batch can read."""
        assert self.cached is not None
        parts: Parts = {}
        if self.logits_weight:
            group = parallel_state.get_tensor_model_parallel_group()
            parts[self.cached.loss_name] = self.cached.loss(
                student, batch[TARGETS](), group=group, vocab_size=self.vocab_size, in_place=not self.lm_weight
            )
        if self.lm_weight:
            parts["lm"] = language_model_loss(student, batch["labels"], self.vocab_size)
        return parts


def with_targets(data_step: Callable[[Any], Any], cached: CachedTeacher) -> Callable[[Any], Any]:
    """NeMo's data step, whose micro-batch can also read its targets: rows are known by their tokens, as a whole.

    Read where the loss is computed, and only then: earlier stages and validation have no use for them. Raises
    InputError, then, for a row that the cache does not have, and for packed samples.
    """

    def step(batches: Any) -> Any:
        item = next(batches)
        whole = item[0] if isinstance(item, tuple) else item
        return data_step(iter([item])) | {TARGETS: lambda: _read(cached, whole)}

    return step


def _read(cached: CachedTeacher, batch: dict[str, Any]) -> CachedTargets:
    """This context-parallel rank's part of the targets, where the logits are."""
    if batch.get("cu_seqlens") is not None:
        raise InputError("a batch has packed samples (cu_seqlens); a logit cache knows rows of one sample each")
    found = cached.targets(batch["tokens"], batch.get("epoch"))
    device = torch.cuda.current_device()
    given = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    moved = {name: None if value is None else value.to(device) for name, value in given.items()}
    return CachedTargets(**get_batch_on_this_cp_rank(moved))
