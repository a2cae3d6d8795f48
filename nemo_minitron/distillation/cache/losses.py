"""Losses of a student's logits, on vocabulary shards, against the few tokens that a cache keeps.

Both are sums over kept tokens K with weights w, and their gradients have one form,

    dL/dz(v) = T (inside * p_s(v) - w(v)) for v in K,    T * outside * p_s(v) for all other v,

where p_s = softmax(z / T). For sampled weights inside = outside = W, the sum of w: W is 1 in expectation and not
normalised away, since w / W would have another expectation than p. So the gradient's expectation is T (p_s - p),
that of the full forward KL; its sum over v is 0, as any softmax loss's is; and noise that moves all weights
together cancels where the student is near the teacher (with 1 in the place of W it would not).
For top-k with a tail t, inside = 1 and outside = 1 - t / (the student's mass outside of K).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import gather_stacked, rank_and_size
from nemo_minitron.distillation.losses._per_token import CHUNK, check_temperature, scale_rows
from nemo_minitron.distillation.losses._softmax import finite
from nemo_minitron.distillation.losses._vocabulary import true_columns


@dataclasses.dataclass(frozen=True)
class CachedTargets:
    """What a cache keeps of the positions of a micro-batch, global ids, filled up to the longest.

    `ids` int64 [..., K], -1 where a position has fewer; `weights` float32 [..., K], 0 there; `tail` float32 [...]:
    the mass of all other tokens (mode "top-k"), else None.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None


def sampled_cross_entropy(
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: Any = None,
    vocab_size: int | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """- T^2 sum_v w(v) log softmax(student / T)(v) per token: unbiased for cross-entropy and gradient (RS-KD).

    A cross-entropy, not a KL: its floor is the teacher's entropy, not 0. [..., V/tp] shards -> [...], fp32, in the
    contract of `distillation.losses`: rank r of `group` holds columns r * W to (r + 1) * W, those at and beyond
    `vocab_size` are padding, `in_place` gives the student's logits up. One collective a call under TP. A kept token
    that the student excludes (-inf) makes it +inf. Raises ValueError for a temperature that is not positive and finite.
    """
    return _Sparse.apply(student_logits, targets.ids, targets.weights, None, temperature, group, vocab_size, in_place)


def cached_top_k_kl(
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: Any = None,
    vocab_size: int | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """T^2 KL between teacher and student over the kept tokens and one tail for the rest, per token; else as above.

    Raises ValueError for targets without a tail.
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
        ctx: Any, logits: Tensor, ids: Tensor, weights: Tensor, tail: Tensor | None, temperature: float, group: Any,
        vocab_size: int | None, in_place: bool,
    ) -> Tensor:  # fmt: skip
        check_temperature(temperature)
        shape, width = logits.shape[:-1], logits.shape[-1]
        true = width if vocab_size is None else true_columns(vocab_size, width, group)
        flat = logits.detach().reshape(shape.numel(), width)
        kept = _Kept(
            ids.reshape(len(flat), -1) - rank_and_size(group)[0] * width, weights.reshape(len(flat), -1),
            None if tail is None else tail.reshape(-1), true,
        )  # fmt: skip
        gradient = (flat if in_place else torch.empty_like(flat)) if ctx.needs_input_grad[0] else None
        inner = None if gradient is None else gradient[:, :true]
        loss = _solve(flat[:, :true], kept, temperature, group, inner)
        if gradient is not None:
            gradient[:, true:].zero_()
            ctx.save_for_backward(gradient)
        ctx.shape = logits.shape
        return loss.reshape(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd's version check refuses a second backward rather than give a wrong one.
        scale_rows(gradient, outputs[0].reshape(-1, 1))
        return gradient.reshape(ctx.shape), *[None] * 7


def _solve(logits: Tensor, kept: _Kept, temperature: float, group: Any, gradient: Tensor | None) -> Tensor:
    """[n, V/tp] -> the loss [n], by chunks of tokens; its gradient into `gradient`, which may be the logits."""
    rows, vocab = logits.shape
    step = max(1, CHUNK[logits.device.type] // max(vocab, 1))
    chunks = [slice(start, start + step) for start in range(0, rows, step)]
    room = torch.empty(min(step, rows), vocab, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(5, rows, dtype=torch.float64, device=logits.device)  # what T^2 multiplies is a difference
    sharded = rank_and_size(group)[1] > 1
    for at in chunks:
        part, outside, inside = _measure(logits[at], kept[at], temperature, room)
        statistics[:, at] = part
        if gradient is not None and not sharded:
            _write(gradient[at], outside, inside, kept[at], part, temperature)
    if sharded:
        statistics = _combined(gather_stacked(statistics, group))
        for at in chunks if gradient is not None else []:
            whole = statistics[:, at]
            _, outside, inside = _measure(logits[at], kept[at], temperature, room, whole[0].float())
            _write(gradient[at], outside, inside, kept[at], whole, temperature)  # type: ignore[index]
    return (_value(statistics, kept) * temperature**2).float()


class _Kept:
    """The kept tokens of n positions: columns of this rank [n, K] (others' are out of range), weights [n, K]."""

    def __init__(self, columns: Tensor, weights: Tensor, tail: Tensor | None, vocab: int) -> None:
        self.columns, self.weights, self.tail, self.vocab = columns, weights, tail, vocab

    def __getitem__(self, at: slice) -> _Kept:
        return _Kept(self.columns[at], self.weights[at], None if self.tail is None else self.tail[at], self.vocab)

    @property
    def mass(self) -> Tensor:
        return self.weights.sum(1)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each token that this rank has, and its weight: [m] each."""
        here = (self.columns >= 0) & (self.columns < self.vocab) & (self.weights > 0)
        return here.nonzero()[:, 0], self.columns[here], self.weights[here]


def _measure(
    logits: Tensor, kept: _Kept, temperature: float, room: Tensor, top: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, V/tp] -> statistics [5, n], float64 (max; sums of exp inside and outside of K; sum of w z; sum of w; exp and
    z shifted by the max, or by `top`), the exponentials outside of K [n, V/tp], in `room`, 0 inside; those inside, [m]
    """
    z = room[: len(logits)].copy_(logits)
    if temperature != 1:
        z.div_(temperature)
    if top is None:
        top = z.amax(1) if kept.vocab else z.new_full((len(z),), -torch.inf)  # a rank that holds padding alone
    z.sub_(finite(top)[:, None])
    rows, columns, weights = kept.entries()
    zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    own, weights = z[rows, columns].double(), weights.double()
    weighted = zero.index_add(0, rows, own * weights)
    exponentials = z.exp_()
    inside = exponentials[rows, columns]
    exponentials[rows, columns] = 0
    # of the same z as `weighted`, so that an error in both is one of the second order
    sums = [zero.index_add(0, rows, own.exp()), exponentials.sum(1).double(), weighted]
    return torch.stack([top.double(), *sums, zero.index_add(0, rows, weights)]), exponentials, inside


def _combined(every: Tensor) -> Tensor:
    """Statistics of all shards [tp, 5, n], shifted to the common max, then summed, in rank order: [5, n]."""
    top = every[:, 0].amax(0)
    down = every[:, 0] - top  # [tp, n], at most 0; -inf on a rank without vocabulary
    inside, outside = (down.exp() * every[:, i] for i in (1, 2))
    weighted = every[:, 3] + finite(down) * every[:, 4]
    return torch.stack([top, *(part.sum(0) for part in (inside, outside, weighted, every[:, 4]))])


def _write(out: Tensor, outside: Tensor, inside: Tensor, kept: _Kept, statistics: Tensor, temperature: float) -> None:
    """d loss / d student logits, in `out`; `outside` is overwritten."""
    statistics = statistics.float()
    total = statistics[1] + statistics[2]
    rows, columns, weights = kept.entries()
    if kept.tail is None:
        scale_inside = scale_outside = kept.mass / total
    else:
        scale_inside, scale_outside = 1 / total, 1 / total - kept.tail / _positive(statistics[2])
    outside.mul_((scale_outside * temperature)[:, None])
    outside[rows, columns] = (inside * scale_inside[rows] - weights) * temperature
    out.copy_(outside)


def _value(statistics: Tensor, kept: _Kept) -> Tensor:
    """Not yet times T^2, float64. Of top-k the kept weights and the tail are 1 in sum but for their own rounding, which
    the last term takes back to the second order."""
    _, inside, outside, weighted, _ = statistics
    normalizer, weights = (inside + outside).log(), kept.weights.double()
    mass = weights.sum(1)
    cross = mass * normalizer - weighted
    if kept.tail is None:
        return cross
    tail = kept.tail.double()
    own = torch.special.xlogy(weights, weights).sum(1) + torch.special.xlogy(tail, tail)
    return own + cross - tail * (_positive(outside).log() - normalizer) + (1 - mass - tail)


def _positive(mass: Tensor) -> Tensor:
    return mass.clamp(min=torch.finfo(torch.float32).tiny)
