"""Cosine distance of the logit vectors (2407.14679, ablation of the losses)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, per_token

SMALL = 1e-8  # the least length of a vector, as in torch's cosine_similarity


def cosine(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """1 - cos(student, teacher) per token, of the logits themselves: [..., V/tp] shards -> [...], fp32.

    The package's contract, but that `temperature` changes nothing: a cosine does not see the length of its vectors, so
    neither division by T nor its make-up T^2 has a place. One collective a call under TP (two where the teacher's
    padding is another).
    """
    check_temperature(temperature)
    return per_token(student_logits, teacher_logits, Cosine(), 1.0, group, vocab_size, in_place)


class Cosine(Rule):
    """d / ds = cos s / |s|^2 - t / (|s| |t|)."""

    def measure(self, s: Tensor, t: Tensor, room: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        return torch.stack([torch.linalg.vecdot(x, y) for x, y in ((s, s), (t, t), (s, t))]), (s, t, room[0])

    def loss(self, whole: Tensor) -> Tensor:
        length_s, length_t = whole[:2].sqrt().clamp(min=SMALL)
        return 1 - whole[2] / (length_s * length_t)

    def gradient(self, work: tuple[Tensor, Tensor, Tensor], part: Tensor, whole: Tensor, out: Tensor) -> None:
        s, t, room = work
        length_s, length_t = whole[:2].sqrt().clamp(min=SMALL)
        along = (1 - self.loss(whole)) / length_s**2
        along_s = torch.mul(s, along[:, None], out=room)
        torch.addcmul(along_s, t, (1 / (length_s * length_t))[:, None], value=-1, out=out)
