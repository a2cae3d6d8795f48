"""Jensen-Shannon divergence: the mean of both models' KL to their mean. It is symmetric and at most log 2.

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import per_token
from nemo_minitron.distillation.losses._softmax import Joined, Softmaxes, Work, log_ratio_shift, scales

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """(KL(p_t || m) + KL(p_s || m)) / 2 * T^2 with m = (p_t + p_s) / 2, per token: [..., V/tp] -> [...], fp32.

    It is finite even if one model excludes a token (-inf). All else is as in the package's contract. Two collectives a
    call under TP, because the mean of both models is known only after both softmaxes are. Three if the teacher is
    padded differently.
    """
    return per_token(student_logits, teacher_logits, JensenShannon(), temperature, group, vocab_size, in_place)


class JensenShannon(Softmaxes):
    """With r = log p_t - log p_s and f = log((1 + e^r) / 2), log(p_s / m) = -f and log(p_t / m) = r - f.

    Where r is small, h(r - f) and h(-f) replace both, with h(u) = e^-u - 1 + u: what they add, 2 m - p_t - p_s, is 0,
    and no digits are lost. d / ds = p_s (sum of p_s f - f) / 2.
    """

    weights = None
    refines = True

    def refine(self, work: Work, part_MN: Tensor, joined_MN: Tensor) -> Tensor:
        joined = Joined(*joined_MN)
        scale_s_N1, scale_t_N1 = scales(part_MN, joined)
        r_NW = _ratio_(work.difference_NW.clone(), part_MN, joined)
        f_NW = _log_mean(r_NW)
        student_N = torch.linalg.vecdot(work.exp_s_NW, f_NW) * scale_s_N1[:, 0]
        near_NW, of_t_NW, of_s_NW = r_NW.abs() < 1, r_NW.sub_(f_NW), f_NW.neg_()
        value_N = torch.linalg.vecdot(work.exp_t_NW, _curved(of_t_NW, near_NW)) * scale_t_N1[:, 0]
        value_N = value_N + torch.linalg.vecdot(work.exp_s_NW, _curved(of_s_NW, near_NW)) * scale_s_N1[:, 0]
        return torch.stack([student_N, value_N])

    def loss(self, joined_MN: Tensor) -> Tensor:
        return joined_MN[len(Joined._fields) + 1] / 2

    def gradient(self, work: Work, part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        count = len(Joined._fields)
        joined, student_N1 = Joined(*joined_MN[:count]), joined_MN[count, :, None]
        f_NW = _log_mean(_ratio_(work.difference_NW, part_MN, joined))
        half_p_s_NW = work.exp_s_NW.mul_(scales(part_MN, joined)[0] / 2)
        torch.mul(half_p_s_NW, f_NW.neg_().add_(student_N1), out=out_NW)


def _ratio_(difference_NW: Tensor, part_MN: Tensor, joined: Joined) -> Tensor:
    """`Work.difference_NW` -> r, in place.

    r is cut off at 30: beyond that the smaller of p_t and p_s is nothing beside the other in fp32, as if it were 0.
    Where both are 0, r does not matter.
    """
    return difference_NW.add_(log_ratio_shift(part_MN, joined)[:, None]).nan_to_num_(0.0).clamp_(-30, 30)


def _curved(u_NW: Tensor, near_NW: Tensor) -> Tensor:
    """h(u) where `near`, u elsewhere."""
    return torch.where(near_NW, torch.expm1(-u_NW).add_(u_NW), u_NW)


def _log_mean(r_NW: Tensor) -> Tensor:
    """log((1 + e^r) / 2), exact to the last digit near 0."""
    return torch.expm1(r_NW).div_(2).log1p_()
