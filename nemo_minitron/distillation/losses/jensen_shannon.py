"""Jensen-Shannon divergence: the mean of both models' KL to their mean; symmetric, at most log 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Softmaxes, Whole, Work, log_ratio_shift, scales


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """(KL(p_t || m) + KL(p_s || m)) / 2 * T^2 with m = (p_t + p_s) / 2, per token: [..., V/tp] -> [...], fp32.

    The package's contract. Two collectives a call under TP (three where the teacher's padding is another): the
    mean is known only once both softmaxes are.
    """
    return per_token(student_logits, teacher_logits, JensenShannon(), temperature, group, vocab_size, in_place)


class JensenShannon(Softmaxes):
    """With r = log p_t - log p_s and f = log((1 + e^r) / 2), log(p_s / m) = -f and log(p_t / m) = r - f.

    d / ds = p_s (sum of p_s f - f) / 2.
    """

    weights = None
    refines = True

    def refine(self, work: Work, part: Tensor, whole: Tensor) -> Tensor:
        w = Whole(*whole)
        (scale_s, scale_t), r = scales(part, w), work.apart + log_ratio_shift(part, w)[:, None]
        f = _log_mean(r)
        student = torch.linalg.vecdot(work.exp_s, f) * scale_s[:, 0]
        return torch.stack([student, torch.linalg.vecdot(work.exp_t, r.sub_(f)) * scale_t[:, 0]])

    def loss(self, whole: Tensor) -> Tensor:
        return (whole[6] - whole[5]) / 2

    def gradient(self, work: Work, part: Tensor, whole: Tensor, out: Tensor) -> None:
        w = Whole(*whole[:5])
        f = _log_mean(work.apart.add_(log_ratio_shift(part, w)[:, None]))
        torch.mul(work.exp_s.mul_(scales(part, w)[0] / 2), f.neg_().add_(whole[5, :, None]), out=out)


def _log_mean(r: Tensor) -> Tensor:
    """log((1 + e^r) / 2), without overflow."""
    return torch.nn.functional.softplus(r, threshold=80.0).sub_(math.log(2))
