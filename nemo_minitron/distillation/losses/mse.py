"""Mean squared difference of the logits (2407.14679, ablation of the losses).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, per_token

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """Mean over the true vocabulary of (student - teacher)^2, per token: [..., V/tp] shards -> [...], fp32.

    As in the package's contract, but `temperature` changes nothing: T^2 undoes the division of both logits by T. One
    collective a call under TP, two if the teacher is padded differently.
    """
    check_temperature(temperature)
    return per_token(student_logits, teacher_logits, MeanSquare(), 1.0, group, vocab_size, in_place)


class MeanSquare(Rule):
    """d / ds = 2 (s - t) / V."""

    def measure(self, s_NW: Tensor, t_NW: Tensor, scratch_3NW: Tensor) -> tuple[Tensor, Tensor]:
        difference_NW = torch.sub(s_NW, t_NW, out=scratch_3NW[0])
        square_N = torch.linalg.vecdot(difference_NW, difference_NW)
        return torch.stack([square_N, torch.full_like(square_N, s_NW.shape[1])]), difference_NW

    def loss(self, joined_MN: Tensor) -> Tensor:
        return joined_MN[0] / joined_MN[1]

    def gradient(self, work: Tensor, part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        torch.mul(work, (2 / joined_MN[1])[:, None], out=out_NW)
