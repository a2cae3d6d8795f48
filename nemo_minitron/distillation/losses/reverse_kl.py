"""Reverse KL, KL(student || teacher): it seeks the teacher's modes (2407.14679, ablation of the losses).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Joined, Softmaxes, Work, scales, shift_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL(softmax(student / T) || softmax(teacher / T)) * T^2 per token: [..., V/tp] shards -> [...], fp32.

    A token that the student excludes (-inf) adds nothing. A token that only the teacher excludes makes the loss +inf,
    which has no gradient (NaN). All else is as in the package's contract. One collective a call under TP, two if the
    teacher is padded differently.
    """
    rule = ReverseKL(temperature > 1)
    return per_token(student_logits, teacher_logits, rule, temperature, group, vocab_size, in_place)


class ReverseKL(Softmaxes):
    """d / ds = p_s (log p_s - log p_t - KL)."""

    weights = "student"

    def loss(self, joined_MN: Tensor) -> Tensor:
        return Joined(*joined_MN).kl

    def gradient(self, work: Work, part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        joined = Joined(*joined_MN)
        shift_N1 = (shift_of(part_MN, joined) - joined.mean)[:, None]  # to log p_t - log p_s minus its mean, -KL
        torch.mul(work.exp_s_NW.mul_(-scales(part_MN, joined)[0]), work.difference_NW.add_(shift_N1), out=out_NW)
