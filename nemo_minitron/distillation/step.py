"""The step: a micro-batch through the student's stage; on the last one its logits and the teacher's -> losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.distillation import losses
from nemo_minitron.distillation.fused_head import accumulates, fused_forward_kl
from nemo_minitron.distillation.losses._vocabulary import true_columns
from nemo_minitron.distillation.meter import TOKENS, Meter
from nemo_minitron.distillation.teacher import Head, Inputs, Teacher, headless

PARTS = ("logits", "lm")
Parts = dict[str, Tensor]  # [B, S] fp32 per token


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the last stage makes of a micro-batch: logits_weight * `loss` + lm_weight * cross entropy.

    `loss`: a name in `distillation.losses`; `top_k` is that of `top_k_kl`. `vocab_size`: the true one.
    """

    vocab_size: int
    loss: str = "forward_kl"
    temperature: float = 1.0
    top_k: int = 100
    logits_weight: float = 1.0
    lm_weight: float = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in PARTS if getattr(self, f"{name}_weight"))

    @property
    def fused(self) -> bool:
        """Whether logits need not exist as a whole: nothing but the KL reads them."""
        return self.loss == "forward_kl" and self.parts == ("logits",)

    def of_states(self, student: Tensor, batch: dict[str, Any], teacher: Tensor, heads: tuple[Head, Head]) -> Parts:
        """From last hidden states [S(/tp under sequence parallelism), B, H] and (student's, teacher's) heads.

        The student's head's gradient is added to its main_grad at once where its factor is known.
        """
        student = student.to(heads[0].weight.dtype)  # a mixed-precision wrapper gives its outputs in fp32
        loss = fused_forward_kl(
            student, heads[0].weight, teacher, heads[1].weight, temperature=self.temperature,
            loss_mask=batch["loss_mask"].t(), vocab_size=self.vocab_size, group=_group(),
            sequence_parallel=heads[0].layer.sequence_parallel, main_grad_scale=self._scale(heads[0]),
        )  # fmt: skip
        return {"logits": loss.t().contiguous()}

    def _scale(self, head: Head) -> float | None:
        """What Megatron will multiply each counted token's loss by, or None: then the gradient has to wait for it."""
        config = head.layer.config
        if not (config.calculate_per_token_loss and accumulates(head.weight)):
            return None
        return self.logits_weight * (float(config.grad_scale_func(torch.ones(1))) if config.grad_scale_func else 1.0)

    def of_logits(self, student: Tensor, batch: dict[str, Any], teacher: Tensor | None) -> Parts:
        """From logits [B, S, V/tp]; the student's are spent."""
        parts = {}
        if teacher is not None:
            options = {"k": self.top_k} if self.loss == "top_k_kl" else {}
            parts["logits"] = getattr(losses, self.loss)(
                student, teacher, temperature=self.temperature, group=_group(), vocab_size=self.vocab_size,
                in_place=not self.lm_weight, **options,
            )  # fmt: skip
        if self.lm_weight:
            # What the other loss may read again in its backward pass is not to be spent; of bf16 it costs nothing more,
            # since cross entropy is in fp32.
            logits = student.to(torch.float32, copy=True) if parts else student
            parts["lm"] = language_model_loss(logits, batch["labels"], self.vocab_size)
        return parts

    def total(self, parts: Parts, batch: dict[str, Any], meter: Meter | None) -> Tensor:
        """[B, S]: the weighted sum; the parts' own sums over the tokens that count go to the meter."""
        if meter is not None:
            for name, value in parts.items():
                meter.add(name, (value.detach() * batch["loss_mask"]).sum())
            meter.add(TOKENS, batch["loss_mask"].sum())
        return torch.stack([getattr(self, f"{name}_weight") * value for name, value in parts.items()]).sum(0)


def _group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


def language_model_loss(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Cross entropy [B, S], fp32, of logits [B, S, V/tp] and labels [B, S]; padded columns take no part.

    The logits are spent: Megatron's cross entropy works in them where they are fp32.
    """
    true = true_columns(vocab_size, logits.shape[-1], _group())
    if true < logits.shape[-1]:
        logits[..., true:].fill_(-torch.inf)
    return vocab_parallel_cross_entropy(logits, labels)


def distillation_step(
    objective: Objective, inputs: Inputs, teacher: Teacher | None = None, meter: Meter | None = None
) -> Callable[[Any, Any], Tensor]:
    """NeMo's forward step with the objective in the place of cross entropy.

    What it returns on the last stage, [B, S] fp32 per token, goes through NeMo's own masked reduction, as a
    language-model loss does. In validation it is cross entropy. Without a teacher it is the LM loss alone.
    """

    def step(model: Any, batch: dict[str, Any]) -> Tensor:
        chunk = unwrap(model)
        if not chunk.post_process:
            return model(**inputs(batch))
        if not model.training:
            return language_model_loss(model(**inputs(batch)), batch["labels"], objective.vocab_size)
        hidden = teacher.hidden(batch) if teacher else None  # first: the student's states are compared with its own
        if teacher and hidden is not None and objective.fused:
            with headless(chunk) as head:
                states = model(**inputs(batch))
            parts = objective.of_states(states, batch, hidden, (head, teacher.head))
        else:
            target = teacher.logits(hidden) if teacher and hidden is not None and objective.logits_weight else None
            parts = objective.of_logits(model(**inputs(batch)), batch, target)
        return objective.total(parts, batch, meter)

    return step
