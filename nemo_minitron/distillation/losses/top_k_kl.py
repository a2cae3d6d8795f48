"""Forward KL over the teacher's k most probable tokens and one bucket for the mass of all others.

Without the bucket (with the k renormalised among themselves) nothing would keep the student's other probabilities from
growing. In the papers top-k loses to the full KL for k up to 100 (2407.14679, section 4).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, K kept entries of a token, M statistics of
a token, R ranks.
"""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses._per_token import Rule, per_token
from nemo_minitron.distillation.losses._softmax import finite

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def top_k_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """KL between (p_t of the teacher's k largest, the sum of the others) and p_s likewise, * T^2, per token.

    [..., V/tp] shards -> [...], fp32. The k largest are those of the whole vocabulary. Of equal logits the first ones
    count, in every layout. Infinities are treated as in forward_kl, and all else is as in the package's contract. From
    k = V on it is forward_kl. One collective a call under TP, of 2k + 4 numbers a token; two if the teacher is padded
    differently. Also raises ValueError unless k is a whole number of at least 1.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k is {k}; it must be a whole number of at least 1")
    return per_token(student_logits, teacher_logits, TopK(k), temperature, group, vocab_size, in_place)


class TopK(Rule):
    """d / ds = p_s - p_t on the k; on the others p_s - p_t(others) p_s / p_s(others).

    The statistics of a shard: max_s, max_t; the logarithms of the sums over all tokens that are no candidates, the
    student's and the teacher's; then K candidates in falling order, the teacher's logits and the student's. All but the
    maxima are relative to the maxima. A shard with fewer than K columns fills up with -inf.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def measure(self, s_NW: Tensor, t_NW: Tensor, scratch_3NW: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not s_NW.shape[1]:
            part_MN = s_NW.new_full((4 + 2 * self.k, len(s_NW)), -torch.inf)
            return part_MN, (s_NW, s_NW.new_zeros(s_NW.shape, dtype=torch.int64))
        max_2N = torch.stack([s_NW.amax(1), t_NW.amax(1)])
        zeros_2N = finite(max_2N)
        s_NW = torch.sub(s_NW, zeros_2N[0][:, None], out=scratch_3NW[0])
        t_NW = torch.sub(t_NW, zeros_2N[1][:, None], out=scratch_3NW[1])
        columns_NK = _largest(t_NW, self.k)  # at most K
        missing = s_NW.new_full((len(s_NW), self.k - columns_NK.shape[1]), -torch.inf)
        candidates = [torch.cat([x_NW.gather(1, columns_NK), missing], 1).t() for x_NW in (t_NW, s_NW)]
        others_s_NW = scratch_3NW[2].copy_(s_NW).scatter_(1, columns_NK, -torch.inf)
        others_t_NW = t_NW.scatter_(1, columns_NK, -torch.inf)
        others = [others_s_NW.logsumexp(1), others_t_NW.logsumexp(1)]
        return torch.cat([max_2N, torch.stack(others), *candidates]), (s_NW, columns_NK)

    def combine(self, parts_RMN: Tensor, rank: int) -> Tensor:
        """-> the loss; max_s, max_t; logarithms of the sums of all (student, teacher); log p_t(others) minus the
        logarithm of the student's sum over the others; K: this rank's own candidates that are among the k.

        A candidate that is not among the k is -inf here. The others are the teacher's logits, relative to max_t.
        """
        parts_RMN = parts_RMN.double()  # a small loss is the difference of large logarithms
        k, ranks, max_2N = self.k, len(parts_RMN), parts_RMN[:, :2].amax(0)
        down_s_RN, down_t_RN = (finite(parts_RMN[:, :2]) - max_2N).unbind(1)
        others_s_RN, others_t_RN = parts_RMN[:, 2] + down_s_RN, parts_RMN[:, 3] + down_t_RN
        # The candidates of all ranks, one after another: [R * K, N].
        t = (parts_RMN[:, 4 : 4 + k] + down_t_RN[:, None]).flatten(0, 1)
        s = (parts_RMN[:, 4 + k :] + down_s_RN[:, None]).flatten(0, 1)
        t, order = t.sort(dim=0, descending=True, stable=True)  # stable: equal logits stay by rank, then by column
        s = s.gather(0, order)
        bucket_s_N = torch.cat([others_s_RN, s[k:]]).logsumexp(0)
        bucket_t_N = torch.cat([others_t_RN, t[k:]]).logsumexp(0)
        log_p_s, log_p_t = torch.cat([s[:k], bucket_s_N[None]]), torch.cat([t[:k], bucket_t_N[None]])  # [K + 1, N]
        total_s_N, total_t_N = log_p_s.logsumexp(0), log_p_t.logsumexp(0)
        p_t, p_s = (log_p_t - total_t_N).exp(), (log_p_s - total_s_N).exp()
        # The sum of p_s - p_t is 0 except for what was rounded, and takes that back.
        terms = p_t * ((log_p_t - total_t_N) - (log_p_s - total_s_N)) - p_t
        loss_N = (torch.where(torch.isinf(log_p_t), 0.0, terms) + p_s).sum(0)
        no_bucket_N = torch.isinf(bucket_t_N) | torch.isinf(bucket_s_N)
        pull_N = torch.where(no_bucket_N, -torch.inf, bucket_t_N - total_t_N - bucket_s_N)
        counted_KN = torch.full_like(t, -torch.inf).scatter_(0, order[:k], t[:k]).view(ranks, k, -1)[rank]
        return torch.cat([torch.stack([loss_N, *max_2N, total_s_N, total_t_N, pull_N]), counted_KN]).float()

    def loss(self, joined_MN: Tensor) -> Tensor:
        return joined_MN[0]

    def gradient(self, work: tuple[Tensor, Tensor], part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        s_NW, columns_NK = work
        _, max_s_N1, _, total_s_N1, total_t_N1, pull_N1 = joined_MN[:6, :, None]
        s_NW.add_(finite(part_MN[0])[:, None] - max_s_N1)
        p_s_NW, others_NW = (s_NW - total_s_N1).exp_(), s_NW.add_(pull_N1).exp_()
        counted_NK = joined_MN[6 : 6 + columns_NK.shape[1]].t()
        p_t_NK = (counted_NK - total_t_N1).exp()
        p_t_NK = torch.where(torch.isinf(counted_NK), others_NW.gather(1, columns_NK), p_t_NK)
        torch.sub(p_s_NW, others_NW.scatter_(1, columns_NK, p_t_NK), out=out_NW)


def _largest(x_NW: Tensor, k: int) -> Tensor:
    """int64 [N, at most K]: columns of each row's k largest numbers, in falling order; of equal numbers the first."""
    bits_NW = (x_NW + 0.0).view(torch.int32)  # + 0.0 makes a positive zero of a negative one
    ordered_NW = torch.where(bits_NW < 0, bits_NW ^ 0x7FFFFFFF, bits_NW).long()  # integers in the numbers' order
    key_NW = (ordered_NW << 32) - torch.arange(x_NW.shape[1], device=x_NW.device)
    return key_NW.topk(min(k, x_NW.shape[1]), dim=1).indices
