"""Jensen-Shannon divergence: the mean of both models' KL to their mean; symmetric, at most log 2."""

from __future__ import annotations

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

    Finite, also where one model excludes a token (-inf). The package's contract. Two collectives a call under TP (three
    where the teacher's padding is another): the mean is known only once both softmaxes are.
    """
    return per_token(student_logits, teacher_logits, JensenShannon(), temperature, group, vocab_size, in_place)


class JensenShannon(Softmaxes):
    """With r = log p_t - log p_s and f = log((1 + e^r) / 2), log(p_s / m) = -f and log(p_t / m) = r - f.

    Where r is small, h(r - f) and h(-f) are taken in the place of both, h(u) = e^-u - 1 + u: what they add, 2 m - p_t -
    p_s, is 0, and no digits are lost. d / ds = p_s (sum of p_s f - f) / 2.
    """

    weights = None
    refines = True

    def refine(self, work: Work, part: Tensor, whole: Tensor) -> Tensor:
        w = Whole(*whole)
        (scale_s, scale_t), r = scales(part, w), _ratio_(work.apart.clone(), part, w)
        f = _log_mean(r)
        student = torch.linalg.vecdot(work.exp_s, f) * scale_s[:, 0]
        near, of_t, of_s = r.abs() < 1, r.sub_(f), f.neg_()
        value = torch.linalg.vecdot(work.exp_t, _curved(of_t, near)) * scale_t[:, 0]
        return torch.stack([student, value + torch.linalg.vecdot(work.exp_s, _curved(of_s, near)) * scale_s[:, 0]])

    def loss(self, whole: Tensor) -> Tensor:
        return whole[len(Whole._fields) + 1] / 2

    def gradient(self, work: Work, part: Tensor, whole: Tensor, out: Tensor) -> None:
        count = len(Whole._fields)
        w, student = Whole(*whole[:count]), whole[count, :, None]
        f = _log_mean(_ratio_(work.apart, part, w))
        torch.mul(work.exp_s.mul_(scales(part, w)[0] / 2), f.neg_().add_(student), out=out)


def _ratio_(apart: Tensor, part: Tensor, whole: Whole) -> Tensor:
    """`Work.apart` -> r, in its place. Beyond 30 the smaller of p_t and p_s is nothing beside the other in fp32, as
    where it is 0. Where both are 0, r does not matter."""
    return apart.add_(log_ratio_shift(part, whole)[:, None]).nan_to_num_(0.0).clamp_(-30, 30)


def _curved(u: Tensor, near: Tensor) -> Tensor:
    """h(u) where `near`, elsewhere u."""
    return torch.where(near, torch.expm1(-u).add_(u), u)


def _log_mean(r: Tensor) -> Tensor:
    """log((1 + e^r) / 2), to the last digit near 0."""
    return torch.expm1(r).div_(2).log1p_()
