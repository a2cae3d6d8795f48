"""Forward KL, KL(teacher || student): the loss of the Minitron papers (2407.14679, section 3).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses import _triton
from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Joined, Softmaxes, Work, scales

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2 per token: [..., V/tp] shards -> [...], fp32.

    A token that the teacher excludes (-inf) adds nothing. A token that only the student excludes makes the loss +inf,
    with the gradient p_s - p_t. All else is as in the package's contract. One collective a call under TP, two if the
    teacher is padded differently. On CUDA, with Triton installed, two kernels do it; each reads the logits once.
    """
    rule = ForwardKL(temperature > 1)
    return per_token(student_logits, teacher_logits, rule, temperature, group, vocab_size, in_place)


class ForwardKL(Softmaxes):
    """d / ds = p_s - p_t."""

    kernels = _triton

    def loss(self, joined_MN: Tensor) -> Tensor:
        return Joined(*joined_MN).kl

    def gradient(self, work: Work, part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        scale_s_N1, scale_t_N1 = scales(part_MN, Joined(*joined_MN))
        torch.addcmul(work.exp_s_NW.mul_(scale_s_N1), work.exp_t_NW, scale_t_N1, value=-1, out=out_NW)
