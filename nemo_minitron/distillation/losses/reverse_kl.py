"""Reverse KL, KL(student || teacher): seeks the teacher's modes (2407.14679, ablation of the losses)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Softmaxes, Whole, Work, scales, shift_of


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL(softmax(student / T) || softmax(teacher / T)) * T^2 per token: [..., V/tp] shards -> [...], fp32.

    A token that the student excludes (-inf) adds nothing; one that the teacher alone excludes makes it +inf, which has
    no gradient (NaN). The package's contract. One collective a call under TP (two where the teacher's padding is
    another).
    """
    rule = ReverseKL(temperature > 1)
    return per_token(student_logits, teacher_logits, rule, temperature, group, vocab_size, in_place)


class ReverseKL(Softmaxes):
    """d / ds = p_s (log p_s - log p_t - KL)."""

    weights = "student"

    def loss(self, whole: Tensor) -> Tensor:
        return Whole(*whole).kl

    def gradient(self, work: Work, part: Tensor, whole: Tensor, out: Tensor) -> None:
        w = Whole(*whole)
        above = (shift_of(part, w) - w.mean)[:, None]  # log p_t - log p_s less its mean, which is -KL
        torch.mul(work.exp_s.mul_(-scales(part, w)[0]), work.apart.add_(above), out=out)
