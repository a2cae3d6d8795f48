"""Losses between two softmaxes: exponentials of a chunk, and their sums joined over the shards of the vocabulary.

Let p be the probabilities of the model whose probabilities weigh, and a(v) the log-ratio of both models' probabilities
up to a constant. Then KL = E[a] + log E[e^-a], for any constant in a. Computed like this a small KL loses all its
digits, and T^2 then makes the error large: 8 % of a loss at T = 10. With u = a - c, c the mean of a, and
h(u) = e^-u - 1 + u, which is never negative, KL = E[u] + log1p(E[h(u)] - E[u]). That loses no digits, and sums of
shards with means of their own join exactly. On a CPU it costs a second look at each chunk, so it is done there only
above T = 1; the kernels always do it.

A logit of -inf is a probability of 0. If the model that weighs has it, it adds nothing. If only the other model has it,
the KL is +inf. Jensen-Shannon is finite in both cases.

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token, R ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule

SMALL = 0.1  # below it a KL is taken from E[h(u)]; above, the logarithms of the sums have digits enough
Sums = tuple[Tensor, Tensor, Tensor]
PLAIN, CENTRED = 5, 7  # M, the number of statistics of a shard


class Work(NamedTuple):
    """Of one chunk, fp32: exponentials of logits that are shifted by this shard's own maxima."""

    exp_s_NW: Tensor
    exp_t_NW: Tensor
    difference_NW: Tensor  # t - s of the shifted logits. 0 where one of them is -inf, except for Jensen-Shannon


class Joined(NamedTuple):
    """Statistics of the whole vocabulary, [N] each: sums of exponentials that are shifted by the maxima."""

    max_s: Tensor
    max_t: Tensor
    sum_s: Tensor
    sum_t: Tensor
    mean: Tensor  # of t - s, both shifted by the maxima, under the rule's weights
    kl: Tensor  # from the model that weighs to the other one, not yet times T^2


class Softmaxes(Rule):
    """`weights`: the model whose probabilities weigh t - s, or None for no such term. `centred`: exact small values.

    The statistics of a shard are max_s, max_t, sum_s, sum_t (sums of exponentials shifted by these maxima), then the
    sum of e^x (t - s), where x are the logits of the model that weighs. If `centred`, the sum of e^x u, the sum of
    e^x h(u) and the c of u stand in the place of the last.
    """

    weights: str | None = "teacher"

    def __init__(self, centred: bool = False) -> None:
        self.centred = centred

    def measure(self, s_NW: Tensor, t_NW: Tensor, scratch_3NW: Tensor) -> tuple[Tensor, Work]:
        if not s_NW.shape[1]:
            zeros_N = s_NW.new_zeros(len(s_NW))
            rest = [zeros_N] * ((CENTRED if self.centred else PLAIN) - 2)
            return torch.stack([zeros_N - torch.inf, zeros_N - torch.inf, *rest]), Work(*scratch_3NW)
        max_s_N, max_t_N = s_NW.amax(1), t_NW.amax(1)
        s_NW = torch.sub(s_NW, finite(max_s_N)[:, None], out=scratch_3NW[0])
        t_NW = torch.sub(t_NW, finite(max_t_N)[:, None], out=scratch_3NW[1])
        difference_NW = torch.sub(t_NW, s_NW, out=scratch_3NW[2])
        work = Work(_exp_(s_NW), _exp_(t_NW), difference_NW)
        statistics = [max_s_N, max_t_N, work.exp_s_NW.sum(1), work.exp_t_NW.sum(1), *self._cross(work)]
        return torch.stack(statistics), work

    def _cross(self, work: Work) -> list[Tensor]:
        """The statistics of t - s, [N] each."""
        if self.weights is None:
            return [torch.zeros_like(work.difference_NW[:, 0])]
        weights_NW, sign = (work.exp_t_NW, 1.0) if self.weights == "teacher" else (work.exp_s_NW, -1.0)
        cross_N = torch.linalg.vecdot(weights_NW, work.difference_NW)
        infinite_N = torch.zeros_like(cross_N)
        if not torch.isfinite(cross_N).all():  # a logit is -inf, or NaN, which the sums keep
            infinite_N = _without_infinities(work.difference_NW, sign)
            cross_N = torch.linalg.vecdot(weights_NW, work.difference_NW)
        if not self.centred:
            return [cross_N + sign * infinite_N]
        mean_N = cross_N / weights_NW.sum(1).clamp(min=torch.finfo(cross_N.dtype).tiny)
        u_NW = (work.difference_NW - mean_N[:, None]).mul_(sign)
        sum_u_N = torch.linalg.vecdot(weights_NW, u_NW) + infinite_N
        return [sum_u_N, torch.linalg.vecdot(weights_NW, u_NW.neg().expm1_().add_(u_NW)), mean_N]

    def combine(self, parts_RMN: Tensor, rank: int) -> Tensor:
        """-> `Joined`, [6, N]: shards are shifted to the common maxima, then summed, in float64."""
        parts_RMN = parts_RMN.double()
        max_2N = parts_RMN[:, :2].amax(0)
        down_R2N = torch.where(torch.isinf(parts_RMN[:, :2]), -torch.inf, parts_RMN[:, :2] - max_2N)  # at most 0
        scale_R2N, sum_2N = down_R2N.exp(), (down_R2N.exp() * parts_RMN[:, 2:4]).sum(0)
        x, sign = (1, 1.0) if self.weights == "teacher" else (0, -1.0)
        weights_RN = scale_R2N[:, x] * parts_RMN[:, 2 + x]
        shift_RN = finite(down_R2N)[:, 1] - finite(down_R2N)[:, 0]  # from a shard's t - s to the vocabulary's
        join = _join_centred if parts_RMN.shape[1] == CENTRED else _join_plain
        mean_N, sum_u_N, sum_h_N = join(parts_RMN[:, 4:], scale_R2N[:, x], weights_RN, shift_RN, sign)
        total_N = sum_2N[x]
        mean_u_N, mean_h_N = sum_u_N / total_N, sum_h_N / total_N
        kl_N = mean_u_N + sign * mean_N + sign * (sum_2N[0] / sum_2N[1]).log()
        exact_N = mean_u_N + torch.log1p(mean_h_N - mean_u_N)
        kl_N = torch.where((mean_h_N < SMALL) & (mean_u_N.abs() < SMALL), exact_N, kl_N)
        return torch.stack([*max_2N, *sum_2N, mean_N + sign * mean_u_N, kl_N]).float()


def _join_plain(parts_R1N: Tensor, scale_RN: Tensor, weights_RN: Tensor, shift_RN: Tensor, sign: float) -> Sums:
    """-> c = 0, the sum of e^x u, and infinity for the sum of e^x h(u), which is not known; [N] each."""
    infinite_RN = torch.isinf(parts_R1N[:, 0])
    plain_RN = scale_RN * parts_R1N[:, 0] + weights_RN * shift_RN
    cross_N = torch.where(infinite_RN, parts_R1N[:, 0], plain_RN).sum(0)
    return torch.zeros_like(cross_N), sign * cross_N, torch.full_like(cross_N, torch.inf)


def _join_centred(parts_R3N: Tensor, scale_RN: Tensor, weights_RN: Tensor, shift_RN: Tensor, sign: float) -> Sums:
    """Shards with a c each -> the common c, the sum of e^x u and the sum of e^x h(u); [N] each.

    With d = c_r - c, h(u + d) = e^-d h(u) - u (e^-d - 1) + h(d).
    """
    sum_u_RN, sum_h_RN, mean_RN = parts_R3N.unbind(1)
    mean_RN = mean_RN + shift_RN
    mean_N = (weights_RN * mean_RN).sum(0) / weights_RN.sum(0)
    d_RN = torch.where(weights_RN > 0, sign * (mean_RN - mean_N), 0.0)
    less_RN = torch.expm1(-d_RN)
    moved_h_RN = scale_RN * (sum_h_RN * (less_RN + 1) - sum_u_RN * less_RN) + weights_RN * (less_RN + d_RN)
    moved_u_RN = torch.where(torch.isinf(sum_u_RN), sum_u_RN, scale_RN * sum_u_RN + weights_RN * d_RN)
    return mean_N, moved_u_RN.sum(0), moved_h_RN.sum(0)


def finite(maxima: Tensor) -> Tensor:
    """Maxima to shift by. A shard without a probability gets 0: its exponentials are 0 in any case."""
    return torch.where(torch.isinf(maxima), 0.0, maxima)


def _without_infinities(difference_NW: Tensor, sign: float) -> Tensor:
    """Puts 0 where one of the two logits is -inf. -> [N]: inf if the model that weighs has a probability there."""
    infinite_N = (difference_NW == sign * torch.inf).any(1)
    difference_NW.nan_to_num_(0.0, 0.0, 0.0)
    return torch.where(infinite_N, torch.inf, 0.0).to(difference_NW.dtype)


def scales(part_MN: Tensor, joined: Joined) -> tuple[Tensor, Tensor]:
    """[N, 1] each: the factors that make a shard's exponentials of student and teacher probabilities."""
    scale_s_N = (part_MN[0] - joined.max_s).exp() / joined.sum_s
    return scale_s_N[:, None], ((part_MN[1] - joined.max_t).exp() / joined.sum_t)[:, None]


def shift_of(part_MN: Tensor, joined: Joined) -> Tensor:
    """[N]: added to `Work.difference_NW` it gives t - s, both shifted by the whole vocabulary's maxima."""
    shift_s_N, shift_t_N = finite(part_MN[0]) - joined.max_s, finite(part_MN[1]) - joined.max_t
    return shift_t_N - shift_s_N


def log_ratio_shift(part_MN: Tensor, joined: Joined) -> Tensor:
    """[N]: added to `Work.difference_NW` it gives log p_t - log p_s."""
    return shift_of(part_MN, joined) - (joined.sum_t.log() - joined.sum_s.log())


def _exp_(x: Tensor) -> Tensor:
    # In base 2 it is four times as fast as `exp_` on a CPU. The product is rounded, which matters only where exp(x)
    # itself is too small to matter.
    return x.mul_(math.log2(math.e)).exp2_()
