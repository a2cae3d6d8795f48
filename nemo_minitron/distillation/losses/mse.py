"""Mean squared difference of the logits (2407.14679, ablation of the losses)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, per_token


def mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """Mean over the true vocabulary of (student - teacher)^2, per token: [..., V/tp] shards -> [...], fp32.

    The package's contract; `temperature` changes nothing, for T^2 undoes the division of both logits by T. One
    collective a call under TP (two where the teacher's padding is another).
    """
    check_temperature(temperature)
    return per_token(student_logits, teacher_logits, MeanSquare(), 1.0, group, vocab_size, in_place)


class MeanSquare(Rule):
    """d / ds = 2 (s - t) / V."""

    def measure(self, s: Tensor, t: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        apart = torch.sub(s, t, out=room[0])
        square = torch.linalg.vecdot(apart, apart)
        return torch.stack([square, torch.full_like(square, s.shape[1])]), apart

    def loss(self, whole: Tensor) -> Tensor:
        return whole[0] / whole[1]

    def gradient(self, work: Tensor, part: Tensor, whole: Tensor, out: Tensor) -> None:
        torch.mul(work, (2 / whole[1])[:, None], out=out)
