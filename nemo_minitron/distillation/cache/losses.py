"""Losses of a student's logits, on vocabulary shards, against the few tokens that a cache keeps.

Both losses are sums over the kept tokens K with weights w, and their gradients have one form:

    dL/dz(v) = T (inside * p_s(v) - w(v)) for v in K,    T * outside * p_s(v) for all other v,

where p_s = softmax(z / T). For sampled weights inside = outside = W, the sum of w. W is 1 in expectation, but it is not
divided out, because w / W would have another expectation than p. So the gradient's expectation is T (p_s - p), that of
the full forward KL. Its sum over v is 0, as for any loss on a softmax. Noise that moves all weights together cancels
if the student is near the teacher; with 1 in the place of W it would not. For top-k with a tail t, inside = 1 and
outside = 1 - t / (the student's mass outside of K).

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, K kept entries of a token, M statistics of
a token, R ranks. I: the kept entries of all tokens in this rank's columns, one after another.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import gather_stacked, rank_and_size
from nemo_minitron.distillation.losses._per_token import CHUNK, check_temperature, scale_rows
from nemo_minitron.distillation.losses._softmax import finite
from nemo_minitron.distillation.losses._vocabulary import true_columns

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True)
class CachedTargets:
    """What a cache keeps of the positions of a micro-batch, with global token ids, filled up to the longest position.

    `ids` int64 [..., K], -1 where a position has fewer. `weights` float32 [..., K], 0 there. `tail` float32 [...]: the
    mass of all other tokens in the mode "top-k", otherwise None.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None


def sampled_cross_entropy(
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: ProcessGroup | None = None,
    vocab_size: int | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """- T^2 sum_v w(v) log softmax(student / T)(v) per token: unbiased for cross-entropy and gradient (RS-KD).

    It is a cross-entropy, not a KL: its least value is the teacher's entropy, not 0. [..., V/tp] shards -> [...], fp32,
    in the contract of `distillation.losses`: rank r of `group` holds the columns r * W to (r + 1) * W, those at and
    beyond `vocab_size` are padding, and `in_place` lets the loss overwrite the student's logits. One collective a call
    under TP. If the student excludes a kept token (-inf), the loss is +inf. Raises ValueError for a temperature that is
    not positive and finite.
    """
    return _Sparse.apply(student_logits, targets.ids, targets.weights, None, temperature, group, vocab_size, in_place)


def cached_top_k_kl(
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: ProcessGroup | None = None,
    vocab_size: int | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """T^2 KL between teacher and student over the kept tokens and one tail for all others, per token.

    All else is as in `sampled_cross_entropy`. Raises ValueError for targets without a tail.
    """
    if targets.tail is None:
        raise ValueError("the targets have no tail: they were sampled; use sampled_cross_entropy")
    return _Sparse.apply(
        student_logits, targets.ids, targets.weights, targets.tail, temperature, group, vocab_size, in_place
    )


class _Sparse(torch.autograd.Function):
    """The gradient is computed in the forward pass, in the logits' own dtype, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, ids: Tensor, weights: Tensor, tail: Tensor | None, temperature: float,
        group: ProcessGroup | None,
        vocab_size: int | None, in_place: bool,
    ) -> Tensor:  # fmt: skip
        check_temperature(temperature)
        shape, width = logits.shape[:-1], logits.shape[-1]
        true_width = width if vocab_size is None else true_columns(vocab_size, width, group)
        logits_NW = logits.detach().reshape(shape.numel(), width)
        kept = _Kept(
            ids.reshape(len(logits_NW), -1) - rank_and_size(group)[0] * width, weights.reshape(len(logits_NW), -1),
            None if tail is None else tail.reshape(-1), true_width,
        )  # fmt: skip
        gradient_NW = (logits_NW if in_place else torch.empty_like(logits_NW)) if ctx.needs_input_grad[0] else None
        true_gradient_NW = None if gradient_NW is None else gradient_NW[:, :true_width]
        loss_N = _loss_and_gradient(logits_NW[:, :true_width], kept, temperature, group, true_gradient_NW)
        if gradient_NW is not None:
            gradient_NW[:, true_width:].zero_()
            ctx.save_for_backward(gradient_NW)
        ctx.shape = logits.shape
        return loss_N.reshape(shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NW,) = ctx.saved_tensors
        # In place: autograd's version check then refuses a second backward pass, which would be wrong.
        scale_rows(gradient_NW, outputs[0].reshape(-1, 1))
        return gradient_NW.reshape(ctx.shape), *[None] * 7


def _loss_and_gradient(
    logits_NW: Tensor, kept: _Kept, temperature: float, group: ProcessGroup | None, gradient_NW: Tensor | None
) -> Tensor:
    """-> the loss [N], by chunks of tokens. Writes its gradient into `gradient_NW`, which may be the logits."""
    tokens, width = logits_NW.shape
    step = max(1, CHUNK[logits_NW.device.type] // max(width, 1))
    chunks = [slice(start, start + step) for start in range(0, tokens, step)]
    scratch_NW = torch.empty(min(step, tokens), width, dtype=torch.float32, device=logits_NW.device)
    # In float64, because T^2 multiplies a difference.
    statistics_MN = torch.empty(5, tokens, dtype=torch.float64, device=logits_NW.device)
    sharded = rank_and_size(group)[1] > 1
    for chunk in chunks:
        part_MN, outside_NW, inside_I = _measure(logits_NW[chunk], kept[chunk], temperature, scratch_NW)
        statistics_MN[:, chunk] = part_MN
        if gradient_NW is not None and not sharded:
            _write_gradient(gradient_NW[chunk], outside_NW, inside_I, kept[chunk], part_MN, temperature)
    if sharded:
        statistics_MN = _combined(gather_stacked(statistics_MN, group))
        for chunk in chunks if gradient_NW is not None else []:
            joined_MN = statistics_MN[:, chunk]
            max_N = joined_MN[0].float()
            _, outside_NW, inside_I = _measure(logits_NW[chunk], kept[chunk], temperature, scratch_NW, max_N)
            out_NW = gradient_NW[chunk]  # type: ignore[index]
            _write_gradient(out_NW, outside_NW, inside_I, kept[chunk], joined_MN, temperature)
    return (_value(statistics_MN, kept) * temperature**2).float()


class _Kept:
    """The kept tokens of N positions. Columns are this rank's; the columns of other ranks are out of range."""

    def __init__(self, columns_NK: Tensor, weights_NK: Tensor, tail_N: Tensor | None, width: int) -> None:
        self.columns_NK, self.weights_NK, self.tail_N, self.width = columns_NK, weights_NK, tail_N, width

    def __getitem__(self, chunk: slice) -> _Kept:
        tail_N = None if self.tail_N is None else self.tail_N[chunk]
        return _Kept(self.columns_NK[chunk], self.weights_NK[chunk], tail_N, self.width)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and weight of each kept token that this rank has: [I] each."""
        here_NK = (self.columns_NK >= 0) & (self.columns_NK < self.width) & (self.weights_NK > 0)
        return here_NK.nonzero()[:, 0], self.columns_NK[here_NK], self.weights_NK[here_NK]


def _measure(
    logits_NW: Tensor, kept: _Kept, temperature: float, scratch_NW: Tensor, max_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> statistics float64 [5, N], the exponentials outside of K [N, W] (0 inside), those inside [I].

    The statistics: the maximum, the sums of exp(z) inside and outside of K, the sum of w z, the sum of w. In all of
    them z are the logits over T minus this shard's maximum, or minus `max_N`. The exponentials lie in `scratch_NW`.
    """
    z_NW = scratch_NW[: len(logits_NW)].copy_(logits_NW)
    if temperature != 1:
        z_NW.div_(temperature)
    if max_N is None:  # a rank that holds nothing but padding has no maximum
        max_N = z_NW.amax(1) if kept.width else z_NW.new_full((len(z_NW),), -torch.inf)
    z_NW.sub_(finite(max_N)[:, None])
    rows_I, columns_I, weights_I = kept.entries()
    zero_N = torch.zeros(len(z_NW), dtype=torch.float64, device=z_NW.device)
    z_I, weights_I = z_NW[rows_I, columns_I].double(), weights_I.double()
    weighted_N = zero_N.index_add(0, rows_I, z_I * weights_I)
    exp_NW = z_NW.exp_()
    inside_I = exp_NW[rows_I, columns_I]
    exp_NW[rows_I, columns_I] = 0
    # From the same z as `weighted_N`: then an error of z counts only in the second order.
    sums = [zero_N.index_add(0, rows_I, z_I.exp()), exp_NW.sum(1).double(), weighted_N]
    return torch.stack([max_N.double(), *sums, zero_N.index_add(0, rows_I, weights_I)]), exp_NW, inside_I


def _combined(parts_RMN: Tensor) -> Tensor:
    """Statistics of all shards -> [5, N]: shifted to the common maximum, then summed in rank order."""
    max_N = parts_RMN[:, 0].amax(0)
    down_RN = parts_RMN[:, 0] - max_N  # at most 0; -inf on a rank without vocabulary
    inside_RN, outside_RN = (down_RN.exp() * parts_RMN[:, i] for i in (1, 2))
    weighted_RN = parts_RMN[:, 3] + finite(down_RN) * parts_RMN[:, 4]
    return torch.stack([max_N, *(x.sum(0) for x in (inside_RN, outside_RN, weighted_RN, parts_RMN[:, 4]))])


def _write_gradient(
    out_NW: Tensor, outside_NW: Tensor, inside_I: Tensor, kept: _Kept, statistics_MN: Tensor, temperature: float
) -> None:
    """Writes d loss / d student logits. `outside_NW` is overwritten."""
    statistics_MN = statistics_MN.float()
    total_N = statistics_MN[1] + statistics_MN[2]
    rows_I, columns_I, weights_I = kept.entries()
    if kept.tail_N is None:
        scale_inside_N = scale_outside_N = kept.weights_NK.sum(1) / total_N
    else:
        scale_inside_N = 1 / total_N
        scale_outside_N = 1 / total_N - kept.tail_N / _positive(statistics_MN[2])
    outside_NW.mul_((scale_outside_N * temperature)[:, None])
    outside_NW[rows_I, columns_I] = (inside_I * scale_inside_N[rows_I] - weights_I) * temperature
    out_NW.copy_(outside_NW)


def _value(statistics_MN: Tensor, kept: _Kept) -> Tensor:
    """The loss, not yet times T^2, float64 [N].

    In top-k the kept weights and the tail sum to 1 except for their own rounding. The last term corrects that to the
    second order.
    """
    _, inside_N, outside_N, weighted_N, _ = statistics_MN
    normalizer_N, weights_NK = (inside_N + outside_N).log(), kept.weights_NK.double()
    mass_N = weights_NK.sum(1)
    cross_N = mass_N * normalizer_N - weighted_N
    if kept.tail_N is None:
        return cross_N
    tail_N = kept.tail_N.double()
    # Minus the teacher's entropy.
    teacher_N = torch.special.xlogy(weights_NK, weights_NK).sum(1) + torch.special.xlogy(tail_N, tail_N)
    log_outside_N = _positive(outside_N).log() - normalizer_N
    return teacher_N + cross_N - tail_N * log_outside_N + (1 - mass_N - tail_N)


def _positive(mass_N: Tensor) -> Tensor:
    return mass_N.clamp(min=torch.finfo(torch.float32).tiny)
