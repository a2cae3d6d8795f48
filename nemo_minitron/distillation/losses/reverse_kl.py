"""Reverse KL, KL(student || teacher): seeks the teacher's modes (2407.14679, ablation of the losses)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Softmaxes, Whole, Work, log_ratio_shift, scales


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL(softmax(student / T) || softmax(teacher / T)) * T^2 per token: [..., V/tp] shards -> [...], fp32.

    The package's contract. One collective a call under TP (two where the teacher's padding is another).
    """
    return per_token(student_logits, teacher_logits, ReverseKL(), temperature, group, vocab_size, in_place)


class ReverseKL(Softmaxes):
    """d / ds = p_s (log p_s - log p_t - KL)."""

    weights = "student"

    def loss(self, whole: Tensor) -> Tensor:
        w = Whole(*whole)
        return w.sum_t.log() - w.sum_s.log() - w.cross / w.sum_s

    def gradient(self, work: Work, part: Tensor, whole: Tensor, out: Tensor) -> None:
        w = Whole(*whole)
        above = (log_ratio_shift(part, w) + self.loss(whole))[:, None]
        torch.mul(work.exp_s.mul_(-scales(part, w)[0]), work.apart.add_(above), out=out)
