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

CHUNK = 1 << 22  # logits that are held in fp32 at a time


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
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: Any = None, first: int = 0
) -> Tensor:
    """- T^2 sum_v w(v) log softmax(student / T)(v) per token: unbiased for cross-entropy and gradient (RS-KD).

    A cross-entropy, not a KL: its floor is the teacher's entropy, not 0. `student_logits`: [..., V/tp], this rank's
    true columns, bf16 or fp32; `first`: the global id of the first of them; `group`: the tensor-parallel process
    group (None: the vocabulary is whole). Returns [...], fp32, the same on every rank of the group. One collective
    a call under TP.
    """
    return _Sparse.apply(student_logits, targets.ids - first, targets.weights, None, temperature, group)


def cached_top_k_kl(
    student_logits: Tensor, targets: CachedTargets, temperature: float = 1.0, group: Any = None, first: int = 0
) -> Tensor:
    """T^2 KL between teacher and student over the kept tokens and one tail for the rest, per token; else as above.

    Raises ValueError for targets without a tail.
    """
    if targets.tail is None:
        raise ValueError("the targets have no tail: they were sampled; use sampled_cross_entropy")
    return _Sparse.apply(student_logits, targets.ids - first, targets.weights, targets.tail, temperature, group)


class _Sparse(torch.autograd.Function):
    """Chunked over tokens; the gradient is computed in the forward pass, in the logits' own dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, columns: Tensor, weights: Tensor, tail: Tensor | None, temperature: float, group: Any
    ) -> Tensor:
        shape, vocab = logits.shape[:-1], logits.shape[-1]
        rows = shape.numel()  # not -1: a rank may hold no column at all
        flat, tail = logits.reshape(rows, vocab), None if tail is None else tail.reshape(rows)
        kept = _Kept(columns.reshape(rows, -1), weights.reshape(rows, -1), vocab)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        sharded = group is not None and torch.distributed.get_world_size(group) > 1
        statistics = torch.empty(5, rows, dtype=torch.float32, device=flat.device)
        step = max(1, CHUNK // max(vocab, 1))
        chunks = [slice(start, start + step) for start in range(0, rows, step)]
        for at in chunks:
            part, exponentials, inside = _local(flat[at], kept[at], temperature)
            statistics[:, at] = part
            if gradient is not None and not sharded:
                scales = _scales(part, kept.mass[at], None if tail is None else tail[at])
                _write(gradient[at], exponentials, inside, kept[at], scales, temperature)
        if sharded:
            statistics = _over_vocabulary(statistics, group)
            scales = _scales(statistics, kept.mass, tail)
            for at in chunks if gradient is not None else []:
                _, exponentials, inside = _local(flat[at], kept[at], temperature, statistics[0, at])
                _write(gradient[at], exponentials, inside, kept[at], scales[:, at], temperature)  # type: ignore[index]
        ctx.save_for_backward(gradient)
        ctx.shape = (*shape, vocab)
        return (_value(statistics, kept, tail) * temperature**2).reshape(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd's version check refuses a second backward rather than give a wrong one.
        scaled = gradient.mul_(outputs[0].reshape(-1, 1).to(gradient.dtype))
        return scaled.reshape(ctx.shape), None, None, None, None, None


class _Kept:
    """The kept tokens of n positions: columns of this rank [n, K] (others' are out of range), weights [n, K]."""

    def __init__(self, columns: Tensor, weights: Tensor, vocab: int) -> None:
        self.columns, self.weights, self.vocab = columns, weights, vocab
        self.mass = weights.sum(1)

    def __getitem__(self, at: slice) -> _Kept:
        return _Kept(self.columns[at], self.weights[at], self.vocab)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each token that this rank has, and its weight: [m] each."""
        here = (self.columns >= 0) & (self.columns < self.vocab) & (self.weights > 0)
        return here.nonzero()[:, 0], self.columns[here], self.weights[here]


def _local(
    logits: Tensor, kept: _Kept, temperature: float, top: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, V/tp] -> statistics [5, n] (max; sums of exp inside and outside of K; sum of w z; sum of w; exp and z
    shifted by the max, or by `top`), the exponentials outside of K [n, V/tp] with 0 inside, those inside [m]."""
    z = logits.float() / temperature
    if top is None:
        top = z.amax(1) if kept.vocab else z.new_full((len(z),), -torch.inf)  # a rank that holds padding alone
    z.sub_(top[:, None])
    rows, columns, weights = kept.entries()
    zero = z.new_zeros(len(z))
    weighted = zero.index_add(0, rows, z[rows, columns] * weights)
    exponentials = z.exp_()
    inside = exponentials[rows, columns]
    exponentials[rows, columns] = 0
    sums = [zero.index_add(0, rows, inside), exponentials.sum(1), weighted, zero.index_add(0, rows, weights)]
    return torch.stack([top, *sums]), exponentials, inside


def _over_vocabulary(local: Tensor, group: Any) -> Tensor:
    """Statistics of all shards [5, n], shifted to the common max, then summed, in rank order."""
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, local, group=group)
    every = torch.stack(parts)  # [tp, 5, n]
    top = every[:, 0].amax(0)
    down = every[:, 0] - top  # [tp, n], at most 0; -inf on a rank without vocabulary
    inside, outside = (down.exp() * every[:, i] for i in (1, 2))
    weighted = every[:, 3] + torch.where(torch.isinf(down), 0.0, down) * every[:, 4]
    return torch.stack([top, *(part.sum(0) for part in (inside, outside, weighted, every[:, 4]))])


def _scales(statistics: Tensor, mass: Tensor, tail: Tensor | None) -> Tensor:
    """[3, n]: 1 / Z, and what p_s is multiplied with inside and outside of K."""
    _, inside, outside, _, _ = statistics
    total = inside + outside
    if tail is None:
        return torch.stack([1 / total, mass, mass])
    return torch.stack([1 / total, torch.ones_like(mass), 1 - tail * total / _positive(outside)])


def _write(
    out: Tensor, outside: Tensor, inside: Tensor, kept: _Kept, scales: Tensor, temperature: float
) -> None:
    """d loss / d student logits, in `out`; `outside` is overwritten."""
    rows, columns, weights = kept.entries()
    values = inside * (scales[0] * scales[1])[rows] - weights
    outside.mul_((scales[0] * scales[2] * temperature)[:, None])
    outside[rows, columns] = values * temperature
    out.copy_(outside)


def _value(statistics: Tensor, kept: _Kept, tail: Tensor | None) -> Tensor:
    _, inside, outside, weighted, _ = statistics
    normalizer = (inside + outside).log()
    cross = kept.mass * normalizer - weighted
    if tail is None:
        return cross
    own = torch.special.xlogy(kept.weights, kept.weights).sum(1) + torch.special.xlogy(tail, tail)
    return own + cross - tail * (_positive(outside).log() - normalizer)


def _positive(mass: Tensor) -> Tensor:
    return mass.clamp(min=torch.finfo(mass.dtype).tiny)
