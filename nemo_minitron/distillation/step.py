"""The step: a micro-batch goes through the student's stage. The last stage compares its logits with the teacher's.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, H hidden size, U the teacher's hidden size, W columns
of the vocabulary on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_minitron.backend.differences import caps_logits, scaled_logits
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.distillation import losses
from nemo_minitron.distillation.fused_head import accumulates, fused_forward_kl
from nemo_minitron.distillation.losses._vocabulary import true_columns
from nemo_minitron.distillation.meter import TOKENS, Meter
from nemo_minitron.distillation.teacher import Batch, Head, Inputs, Teacher, headless

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed import ProcessGroup

    from nemo_minitron.importance.batches import Batch

PARTS = ("logits", "lm")
Parts = dict[str, Tensor]  # the name of a part of the loss -> fp32 [B, S], per token


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch on the last stage: logits_weight * `loss` + lm_weight * cross entropy.

    `loss`: a name in `distillation.losses`. `top_k`: the k of `top_k_kl`. `vocab_size`: the student's, without padding.
    `common`: the tokens that the teacher has, too; `loss` compares these alone. None: all of them.
    """

    vocab_size: int
    loss: str = "forward_kl"
    temperature: float = 1.0
    top_k: int = 100
    logits_weight: float = 1.0
    lm_weight: float = 0.0
    common: int | None = None

    @property
    def compared(self) -> int:
        """The number of tokens that `loss` compares, the first of both vocabularies."""
        return self.vocab_size if self.common is None else self.common

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts whose weight is not 0."""
        return tuple(name for name in PARTS if getattr(self, f"{name}_weight"))

    @property
    def fused(self) -> bool:
        """Whether the fused head can do it: only the KL reads the logits, so they need not exist as a whole."""
        return self.loss == "forward_kl" and self.parts == ("logits",)

    def of_states(
        self, student_SBH: Tensor, batch: Batch, teacher_SBU: Tensor, student_head: Head, teacher_head: Head
    ) -> Parts:
        """The parts from last hidden states (S / tp under sequence parallelism) and both heads.

        If the factor of the student's head's gradient is known, the gradient is added to main_grad at once.
        """
        weight = student_head.weight
        student_SBH = student_SBH.to(weight.dtype)  # a mixed-precision wrapper gives its outputs in fp32
        # what multiplies the logits may as well multiply the states
        student_SBH = scaled_logits(student_head.model, student_SBH)
        teacher_SBU = scaled_logits(teacher_head.model, teacher_SBU)
        loss_SB = fused_forward_kl(
            student_SBH, weight, teacher_SBU, teacher_head.weight, temperature=self.temperature,
            loss_mask=batch["loss_mask"].t(), vocab_size=self.compared, group=_group(),
            sequence_parallel=student_head.layer.sequence_parallel, main_grad_scale=self._scale(student_head),
        )  # fmt: skip
        return {"logits": loss_SB.t().contiguous()}

    def _scale(self, head: Head) -> float | None:
        """What Megatron will multiply each counted token's loss by. None if that is known only in the backward pass."""
        config = head.layer.config
        if not (config.calculate_per_token_loss and accumulates(head.weight)):
            return None
        return self.logits_weight * (float(config.grad_scale_func(torch.ones(1))) if config.grad_scale_func else 1.0)

    def of_logits(self, student_BSW: Tensor, batch: Batch, teacher_BSW: Tensor | None) -> Parts:
        """The parts from logits. The student's logits may be overwritten."""
        parts = {}
        if teacher_BSW is not None:
            options = {"k": self.top_k} if self.loss == "top_k_kl" else {}
            parts["logits"] = getattr(losses, self.loss)(
                student_BSW, teacher_BSW, temperature=self.temperature, group=_group(), vocab_size=self.compared,
                in_place=not self.lm_weight, **options,
            )  # fmt: skip
        if self.lm_weight:
            # Cross entropy overwrites its logits, and the other loss may read them again in its backward pass. From
            # bf16 the copy costs nothing more, because cross entropy needs fp32.
            copy_BSW = student_BSW.to(torch.float32, copy=True) if parts else student_BSW
            parts["lm"] = language_model_loss(copy_BSW, batch["labels"], self.vocab_size)
        return parts

    def total(self, parts: Parts, batch: Batch, meter: Meter | None) -> Tensor:
        """[B, S]: the weighted sum of the parts. The meter gets each part's sum over the tokens that count."""
        if meter is not None:
            for name, value in parts.items():
                meter.add(name, (value.detach() * batch["loss_mask"]).sum())
            meter.add(TOKENS, batch["loss_mask"].sum())
        return torch.stack([getattr(self, f"{name}_weight") * value for name, value in parts.items()]).sum(0)


def _group() -> ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def language_model_loss(logits_BSW: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
    """Cross entropy, fp32 [B, S]. Padded columns take no part.

    fp32 logits are overwritten: Megatron's cross entropy works in them.
    """
    true_width = true_columns(vocab_size, logits_BSW.shape[-1], _group())
    if true_width < logits_BSW.shape[-1]:
        logits_BSW[..., true_width:].fill_(-torch.inf)
    return vocab_parallel_cross_entropy(logits_BSW, labels_BS)


def _products(*models: MegatronModule) -> bool:
    """Whether the logits of these models are products of states and weights, which is all that the fused head knows."""
    return not any(map(caps_logits, models))


def distillation_step(
    objective: Objective, inputs: Inputs, teacher: Teacher | None = None, meter: Meter | None = None
) -> Callable[[MegatronModule, Batch], Tensor]:
    """NeMo's forward step, with the objective in the place of cross entropy.

    On the last stage it returns fp32 [B, S], per token. NeMo's own masked reduction goes over it, as over a
    language-model loss. In validation it returns cross entropy. Without a teacher it is only the language-model loss.
    """

    def step(model: MegatronModule, batch: Batch) -> Tensor:
        chunk = unwrap(model)
        if not chunk.post_process:
            return model(**inputs(batch))
        if not model.training:
            return language_model_loss(model(**inputs(batch)), batch["labels"], objective.vocab_size)
        # The teacher runs first: the student's intermediate states are compared with the teacher's as they arise.
        teacher_SBU = teacher.hidden(batch) if teacher else None
        if teacher and teacher_SBU is not None and objective.fused and _products(chunk, teacher.head.model):
            with headless(chunk) as head:
                student_SBH = model(**inputs(batch))
            parts = objective.of_states(student_SBH, batch, teacher_SBU, head, teacher.head)
        else:
            teacher_BSW = None
            if teacher and teacher_SBU is not None and objective.logits_weight:
                teacher_BSW = teacher.logits(teacher_SBU)
            parts = objective.of_logits(model(**inputs(batch)), batch, teacher_BSW)
        return objective.total(parts, batch, meter)

    return step
