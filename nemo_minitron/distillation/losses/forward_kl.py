"""Forward KL, KL(teacher || student): the loss of the Minitron papers (2407.14679, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses import _triton
from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Softmaxes, Whole, Work, scales


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2 per token: [..., V/tp] shards -> [...], fp32.

    A token that the teacher excludes (-inf) adds nothing; one that the student alone excludes makes it +inf, with the
    gradient p_s - p_t. The package's contract. One collective a call under TP (two where the teacher's padding is
    another). On CUDA, with Triton installed, two kernels that read the logits once each.
    """
    rule = ForwardKL(temperature > 1)
    return per_token(student_logits, teacher_logits, rule, temperature, group, vocab_size, in_place)


class ForwardKL(Softmaxes):
    """d / ds = p_s - p_t."""

    kernels = _triton

    def loss(self, whole: Tensor) -> Tensor:
        return Whole(*whole).kl

    def gradient(self, work: Work, part: Tensor, whole: Tensor, out: Tensor) -> None:
        scale_s, scale_t = scales(part, Whole(*whole))
        torch.addcmul(work.exp_s.mul_(scale_s), work.exp_t, scale_t, value=-1, out=out)
