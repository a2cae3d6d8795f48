"""Cosine distance of the logit vectors (2407.14679, ablation of the losses).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, per_token

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SMALL = 1e-8  # the least length of a vector, as in torch's cosine_similarity


def cosine(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """1 - cos(student, teacher) per token, of the logits themselves: [..., V/tp] shards -> [...], fp32.

    As in the package's contract, but `temperature` changes nothing: a cosine does not depend on the length of its
    vectors, so the logits are not divided by T and the loss is not multiplied by T^2. One collective a call under TP,
    two if the teacher is padded differently.
    """
    check_temperature(temperature)
    return per_token(student_logits, teacher_logits, Cosine(), 1.0, group, vocab_size, in_place)


class Cosine(Rule):
    """d / ds = cos s / |s|^2 - t / (|s| |t|)."""

    def measure(self, s_NW: Tensor, t_NW: Tensor, scratch_3NW: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        products = ((s_NW, s_NW), (t_NW, t_NW), (s_NW, t_NW))
        return torch.stack([torch.linalg.vecdot(x, y) for x, y in products]), (s_NW, t_NW, scratch_3NW[0])

    def loss(self, joined_MN: Tensor) -> Tensor:
        length_s_N, length_t_N = joined_MN[:2].sqrt().clamp(min=SMALL)
        return 1 - joined_MN[2] / (length_s_N * length_t_N)

    def gradient(self, work: tuple[Tensor, Tensor, Tensor], part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        s_NW, t_NW, scratch_NW = work
        length_s_N, length_t_N = joined_MN[:2].sqrt().clamp(min=SMALL)
        factor_s_N = (1 - self.loss(joined_MN)) / length_s_N**2
        along_s_NW = torch.mul(s_NW, factor_s_N[:, None], out=scratch_NW)
        torch.addcmul(along_s_NW, t_NW, (1 / (length_s_N * length_t_N))[:, None], value=-1, out=out_NW)
