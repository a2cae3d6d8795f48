"""Forward KL over the teacher's k most probable tokens and one bucket for the mass of all others.

Without the bucket (the k renormalised among themselves) the student's other probabilities are free to grow; the papers
saw top-k lose to the whole KL for k up to 100 (2407.14679, section 4).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, per_token
from nemo_minitron.distillation.losses._softmax import finite


def top_k_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    temperature: float = 1.0,
    group: Any = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL between (p_t of the teacher's k largest, the rest's sum) and p_s likewise, * T^2, per token.

    [..., V/tp] shards -> [...], fp32. The package's contract. The k largest are of the whole vocabulary; of equal
    logits the first count, in every layout. One collective a call under TP (two where the teacher's padding is
    another), of 2k + 4 numbers a token. Infinities as in forward_kl. Also raises ValueError for a k that is no whole
    number of at least 1. From k = V on it is forward_kl.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k is {k}; it must be a whole number of at least 1")
    return per_token(student_logits, teacher_logits, TopK(k), temperature, group, vocab_size, in_place)


class TopK(Rule):
    """d / ds = p_s - p_t on the k; on the rest p_s - p_t(rest) p_s / p_s(rest).

    A part is, all but the maxima relative to them: max_s, max_t, log of the sums over what is no candidate (2), and k
    candidates in falling order, the teacher's and the student's logits (k + k), -inf where a shard has fewer.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def measure(self, s: Tensor, t: Tensor, room: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not s.shape[1]:
            return s.new_full((4 + 2 * self.k, len(s)), -torch.inf), (s, s.new_zeros(s.shape, dtype=torch.int64))
        tops = torch.stack([s.amax(1), t.amax(1)])
        zeros = finite(tops)
        s, t = (torch.sub(x, zero[:, None], out=out) for x, zero, out in zip((s, t), zeros, room, strict=False))
        first = _largest(t, self.k)  # [n, at most k]
        none = s.new_full((len(s), self.k - first.shape[1]), -torch.inf)
        chosen = [torch.cat([x.gather(1, first), none], 1).t() for x in (t, s)]
        others = room[2].copy_(s).scatter_(1, first, -torch.inf), t.scatter_(1, first, -torch.inf)
        rest = [x.logsumexp(1) for x in others]
        return torch.cat([tops, torch.stack(rest), *chosen]), (s, first)

    def combine(self, parts: Tensor, rank: int) -> Tensor:
        """-> loss, max_s, max_t, log sums of all (2), log p_t(rest) - log sum_s(rest), own candidates that count (k).

        A candidate that does not count is -inf here; the others are the teacher's logits, relative to max_t.
        """
        parts = parts.double()  # a small loss is what is left of large logarithms
        k, tp, tops = self.k, len(parts), parts[:, :2].amax(0)
        down_s, down_t = (finite(parts[:, :2]) - tops).unbind(1)  # [tp, n]
        rest_s, rest_t = parts[:, 2] + down_s, parts[:, 3] + down_t
        t, s = (x.flatten(0, 1) for x in (parts[:, 4 : 4 + k] + down_t[:, None], parts[:, 4 + k :] + down_s[:, None]))
        t, order = t.sort(dim=0, descending=True, stable=True)  # stable: by rank, then by column among equals
        s = s.gather(0, order)
        bucket_s = torch.cat([rest_s, s[k:]]).logsumexp(0)
        bucket_t = torch.cat([rest_t, t[k:]]).logsumexp(0)
        log_p_s, log_p_t = torch.cat([s[:k], bucket_s[None]]), torch.cat([t[:k], bucket_t[None]])
        all_s, all_t = log_p_s.logsumexp(0), log_p_t.logsumexp(0)
        p_t, p_s = (log_p_t - all_t).exp(), (log_p_s - all_s).exp()
        terms = p_t * ((log_p_t - all_t) - (log_p_s - all_s)) - p_t  # and p_s: 0 in sum, but for what was rounded
        loss = (torch.where(torch.isinf(log_p_t), 0.0, terms) + p_s).sum(0)
        none = torch.isinf(bucket_t) | torch.isinf(bucket_s)
        pull = torch.where(none, -torch.inf, bucket_t - all_t - bucket_s)
        counted = torch.full_like(t, -torch.inf).scatter_(0, order[:k], t[:k]).view(tp, k, -1)[rank]
        return torch.cat([torch.stack([loss, *tops, all_s, all_t, pull]), counted]).float()

    def loss(self, whole: Tensor) -> Tensor:
        return whole[0]

    def gradient(self, work: tuple[Tensor, Tensor], part: Tensor, whole: Tensor, out: Tensor) -> None:
        s, first = work
        _, max_s, _, all_s, all_t, pull = whole[:6, :, None]
        s.add_(finite(part[0])[:, None] - max_s)
        p_s, rest = (s - all_s).exp_(), s.add_(pull).exp_()
        counted = whole[6 : 6 + first.shape[1]].t()  # [n, at most k]
        p_t = torch.where(torch.isinf(counted), rest.gather(1, first), (counted - all_t).exp())
        torch.sub(p_s, rest.scatter_(1, first, p_t), out=out)


def _largest(x: Tensor, k: int) -> Tensor:
    """Columns of each row's k largest (or all), in falling order, of equals the first: [n, V] -> int64 [n, k]."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0: one zero only
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # as integers, in the order of the numbers
    key = (ordered << 32) - torch.arange(x.shape[1], device=x.device)
    return key.topk(min(k, x.shape[1]), dim=1).indices
