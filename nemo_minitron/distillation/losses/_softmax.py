"""Losses between two softmaxes: exponentials of a chunk, and their sums joined over the shards of the vocabulary.

With weights p of one model and a(v) the other's log-ratio up to a constant, KL = E[a] + log E[e^-a], for any constant
in a. As it stands a small KL is left with no digits, and T^2 then makes the error large: 8 % of a loss at T = 10. With
u = a - c, c the mean of a, and h(u) = e^-u - 1 + u, which is never negative, KL = E[u] + log1p(E[h(u)] - E[u]): no
digits are lost, and sums of shards with means of their own join exactly. It costs a CPU a second look at each chunk, so
there it is done above T = 1 alone; the kernels do it always.

A logit of -inf is a probability of 0. Where the weights' model has it, it adds nothing; where the other one has it
alone, the KL is +inf. Jensen-Shannon is finite in both cases.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule

SMALL = 0.1  # a KL below which E[h(u)] is taken; above, the logarithms of the sums have digits enough
Sums = tuple[Tensor, Tensor, Tensor]
PLAIN, CENTRED = 5, 7  # numbers of a part


class Work(NamedTuple):
    """Of one chunk [n, W], fp32: exponentials of logits that are shifted by this shard's own maxima."""

    exp_s: Tensor
    exp_t: Tensor
    apart: Tensor  # t - s, of the shifted logits; 0 where one of them is -inf, but for Jensen-Shannon


class Whole(NamedTuple):
    """Of the whole vocabulary, [n] each: sums of exponentials shifted by the maxima."""

    max_s: Tensor
    max_t: Tensor
    sum_s: Tensor
    sum_t: Tensor
    mean: Tensor  # of t - s, both shifted by the maxima, under the rule's weights
    kl: Tensor  # of the rule's weights to the other model, not yet times T^2


class Softmaxes(Rule):
    """`weights`: which model's probabilities weigh t - s, or None for no such term. `centred`: small values exactly.

    A part is max_s, max_t, sum_s, sum_t (exponentials shifted by these maxima) and the sum of e^x (t - s), of the
    weights x; centred the sums of e^x u and e^x h(u), and the c of u instead.
    """

    weights: str | None = "teacher"

    def __init__(self, centred: bool = False) -> None:
        self.centred = centred

    def measure(self, s: Tensor, t: Tensor, room: Tensor) -> tuple[Tensor, Work]:
        if not s.shape[1]:
            nothing = s.new_zeros(len(s))
            rest = [nothing] * ((CENTRED if self.centred else PLAIN) - 2)
            return torch.stack([nothing - torch.inf, nothing - torch.inf, *rest]), Work(*room)
        max_s, max_t = s.amax(1), t.amax(1)
        s = torch.sub(s, finite(max_s)[:, None], out=room[0])
        t = torch.sub(t, finite(max_t)[:, None], out=room[1])
        apart = torch.sub(t, s, out=room[2])
        work = Work(_exp_(s), _exp_(t), apart)
        found = [max_s, max_t, work.exp_s.sum(1), work.exp_t.sum(1), *self._cross(work)]
        return torch.stack(found), work

    def _cross(self, work: Work) -> list[Tensor]:
        if self.weights is None:
            return [torch.zeros_like(work.apart[:, 0])]
        weights, sign = (work.exp_t, 1.0) if self.weights == "teacher" else (work.exp_s, -1.0)
        cross = torch.linalg.vecdot(weights, work.apart)
        endless = torch.zeros_like(cross)
        if not torch.isfinite(cross).all():  # a logit of -inf, or numbers that are none, which the sums keep
            endless = _without_infinities(work.apart, sign)
            cross = torch.linalg.vecdot(weights, work.apart)
        if not self.centred:
            return [cross + sign * endless]
        mean = cross / weights.sum(1).clamp(min=torch.finfo(cross.dtype).tiny)
        u = (work.apart - mean[:, None]).mul_(sign)
        first = torch.linalg.vecdot(weights, u) + endless
        return [first, torch.linalg.vecdot(weights, u.neg().expm1_().add_(u)), mean]

    def combine(self, parts: Tensor, rank: int) -> Tensor:
        """[tp, 5 or 7, n] -> Whole, [6, n]: shifted to the common maxima, then summed, in float64."""
        parts = parts.double()
        top = parts[:, :2].amax(0)
        down = torch.where(torch.isinf(parts[:, :2]), -torch.inf, parts[:, :2] - top)  # [tp, 2, n], at most 0
        scale, sums = down.exp(), (down.exp() * parts[:, 2:4]).sum(0)
        x, sign = (1, 1.0) if self.weights == "teacher" else (0, -1.0)
        weights = scale[:, x] * parts[:, 2 + x]
        shift = finite(down)[:, 1] - finite(down)[:, 0]  # of this shard's t - s to that of the whole
        joined = _joined if parts.shape[1] == CENTRED else _summed
        mean, first, second = joined(parts[:, 4:], scale[:, x], weights, shift, sign)
        total = sums[x]
        first, second = first / total, second / total
        kl = first + sign * mean + sign * (sums[0] / sums[1]).log()
        exact = first + torch.log1p(second - first)
        kl = torch.where((second < SMALL) & (first.abs() < SMALL), exact, kl)
        return torch.stack([*top, *sums, mean + sign * first, kl]).float()


def _summed(parts: Tensor, scale: Tensor, weights: Tensor, shift: Tensor, sign: float) -> Sums:
    """Plain parts [tp, 1, n] -> c = 0, the sum of e^x u, and no sum of e^x h(u)."""
    infinite = torch.isinf(parts[:, 0])
    cross = torch.where(infinite, parts[:, 0], scale * parts[:, 0] + weights * shift).sum(0)
    return torch.zeros_like(cross), sign * cross, torch.full_like(cross, torch.inf)


def _joined(parts: Tensor, scale: Tensor, weights: Tensor, shift: Tensor, sign: float) -> Sums:
    """Centred parts [tp, 3, n], each with a c of its own -> the common c, and the sums of e^x u and e^x h(u).

    With d = c_r - c, h(u + d) = e^-d h(u) - u (e^-d - 1) + h(d).
    """
    first, second, own = parts.unbind(1)
    own = own + shift
    mean = (weights * own).sum(0) / weights.sum(0)
    d = torch.where(weights > 0, sign * (own - mean), 0.0)
    less = torch.expm1(-d)
    both = scale * (second * (less + 1) - first * less) + weights * (less + d)
    firsts = torch.where(torch.isinf(first), first, scale * first + weights * d)
    return mean, firsts.sum(0), both.sum(0)


def finite(maxima: Tensor) -> Tensor:
    """Maxima to shift by: 0 for a shard without a probability, whose exponentials are 0 anyway."""
    return torch.where(torch.isinf(maxima), 0.0, maxima)


def _without_infinities(apart: Tensor, sign: float) -> Tensor:
    """Puts 0 where one of the two logits is -inf; [n]: inf where the weights' model has a probability there, else 0."""
    endless = (apart == sign * torch.inf).any(1)
    apart.nan_to_num_(0.0, 0.0, 0.0)
    return torch.where(endless, torch.inf, 0.0).to(apart.dtype)


def scales(part: Tensor, whole: Whole) -> tuple[Tensor, Tensor]:
    """[n, 1] each: what a shard's exponentials of student and teacher are multiplied by to be probabilities."""
    scale_s = (part[0] - whole.max_s).exp() / whole.sum_s
    return scale_s[:, None], ((part[1] - whole.max_t).exp() / whole.sum_t)[:, None]


def shift_of(part: Tensor, whole: Whole) -> Tensor:
    """[n]: what is added to `Work.apart` to make it t - s, both shifted by the whole vocabulary's maxima."""
    shift_s, shift_t = finite(part[0]) - whole.max_s, finite(part[1]) - whole.max_t
    return shift_t - shift_s


def log_ratio_shift(part: Tensor, whole: Whole) -> Tensor:
    """[n]: what is added to `Work.apart` to make log p_t - log p_s."""
    return shift_of(part, whole) - (whole.sum_t.log() - whole.sum_s.log())


def _exp_(x: Tensor) -> Tensor:
    # In base 2: four times as fast as `exp_` on a CPU. The product's rounding matters only where exp(x) does not.
    return x.mul_(math.log2(math.e)).exp2_()
