"""The step: teacher's and student's logits of one batch -> the loss of each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.distillation import losses

Loss = Callable[[Tensor, Tensor], Tensor]


def masked_loss(name: str, temperature: float, vocab_size: int) -> Loss:
    """A loss by name on this rank's shard [B, S, V/tp] -> [B, S]; columns that pad the vocabulary take no part."""
    loss = getattr(losses, name)

    def masked(student: Tensor, teacher: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        true = _true_columns(vocab_size, student.shape[-1])
        return loss(student[..., :true], teacher[..., :true], temperature, group)

    return masked


def _true_columns(vocab_size: int, local: int) -> int:
    first = parallel_state.get_tensor_model_parallel_rank() * local
    return max(0, min(local, vocab_size - first))


def distillation_step(teacher: Any, loss: Loss) -> Callable[[Any, Any], Tensor]:
    """NeMo's forward step with the loss against the teacher in the place of cross entropy.

    What it returns, [B, S] fp32 per token, goes through NeMo's own masked reduction, as a language-model
    loss does. In validation it is NeMo's cross entropy as before.
    """

    def step(model: Any, batch: dict[str, Any]) -> Tensor:
        inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"]}
        mask = batch.get("attention_mask")
        if not model.training:
            return model(**inputs, attention_mask=mask, labels=batch["labels"])
        with torch.no_grad():
            target = teacher(**inputs, attention_mask=mask)
        return loss(model(**inputs, attention_mask=mask), target)

    return step
