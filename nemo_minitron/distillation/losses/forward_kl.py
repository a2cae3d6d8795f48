"""Forward KL, KL(teacher || student): the loss of the Minitron papers (2407.14679, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # logits that are held in fp32 at a time, for each model


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, group: Any = None) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2 per token.

    student_logits, teacher_logits: [..., V/tp], local shards of the vocabulary, bf16 or fp32; teacher's is
    a constant. `group`: the tensor-parallel process group (None: the vocabulary is whole). Returns [...],
    fp32, the same on every rank of the group. One collective a call under TP; no fp32 copy of all logits.
    Raises ValueError for shapes that differ or a temperature that is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits are {tuple(student_logits.shape)}, teacher's {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return _ForwardKL.apply(student_logits, teacher_logits.detach(), temperature, group)


class _ForwardKL(torch.autograd.Function):
    """Chunked over tokens; the gradient is computed in the forward pass, in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
        shape, vocab = student.shape[:-1], student.shape[-1]
        rows = shape.numel()  # not -1: a rank may hold no column at all
        student, teacher = student.reshape(rows, vocab), teacher.reshape(rows, vocab)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        statistics = torch.empty(5, len(student), dtype=torch.float32, device=student.device)
        sharded = group is not None and torch.distributed.get_world_size(group) > 1
        step = max(1, CHUNK // max(vocab, 1))
        chunks = [slice(start, start + step) for start in range(0, rows, step)]
        for at in chunks:
            part, exp_s, exp_t = _local(student[at], teacher[at], temperature)
            statistics[:, at] = part
            if gradient is not None and not sharded:
                _write_gradient(gradient[at], exp_s / part[2, :, None], exp_t / part[3, :, None], temperature)
        if sharded:
            statistics = _over_vocabulary(statistics, group)
            for at in chunks if gradient is not None else []:
                p_s, p_t = _probabilities(student[at], teacher[at], temperature, statistics[:, at])
                _write_gradient(gradient[at], p_s, p_t, temperature)  # type: ignore[index]
        ctx.save_for_backward(gradient)
        ctx.shape = (*shape, vocab)
        _, _, sum_s, sum_t, cross = statistics
        loss = cross / sum_t - sum_t.log() + sum_s.log()
        return (loss * temperature**2).reshape(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd's version check refuses a second backward rather than give a wrong one.
        scaled = gradient.mul_(outputs[0].reshape(-1, 1).to(gradient.dtype))
        return scaled.reshape(ctx.shape), None, None, None


def _local(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """[n, V/tp] -> statistics [5, n] (max s, max t, sum exp s, sum exp t, sum exp t * (t - s), each shifted
    by its max) and both exponentials, fp32."""
    s, t = student.float() / temperature, teacher.float() / temperature
    if not s.shape[1]:  # a rank that holds padding alone
        zero = s.new_zeros(len(s))
        return torch.stack([zero - torch.inf, zero - torch.inf, zero, zero, zero]), s, t
    max_s, max_t = s.amax(1), t.amax(1)
    s.sub_(max_s[:, None])
    t.sub_(max_t[:, None])
    exp_t = t.exp()
    cross = (exp_t * t.sub_(s)).sum(1)
    exp_s = s.exp_()
    return torch.stack([max_s, max_t, exp_s.sum(1), exp_t.sum(1), cross]), exp_s, exp_t


def _over_vocabulary(local: Tensor, group: Any) -> Tensor:
    """Statistics of all shards [5, n]: shifted to the common maxima, then summed, in rank order."""
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, local, group=group)
    every = torch.stack(parts)  # [tp, 5, n]
    top = every[:, :2].amax(0)
    down = every[:, :2] - top  # [tp, 2, n], at most 0; -inf on a rank without vocabulary
    scale = down.exp()
    shift = torch.where(torch.isinf(down[:, 1]), 0.0, down[:, 1] - down[:, 0])
    cross = (scale[:, 1] * (every[:, 4] + every[:, 3] * shift)).sum(0)
    sums = (scale * every[:, 2:4]).sum(0)
    return torch.stack([top[0], top[1], sums[0], sums[1], cross])


def _probabilities(student: Tensor, teacher: Tensor, temperature: float, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """This shard's probabilities [n, V/tp], fp32."""
    max_s, max_t, sum_s, sum_t, _ = statistics[:, :, None]
    p_s = (student.float() / temperature).sub_(max_s).exp_().div_(sum_s)
    return p_s, (teacher.float() / temperature).sub_(max_t).exp_().div_(sum_t)


def _write_gradient(out: Tensor, p_s: Tensor, p_t: Tensor, temperature: float) -> None:
    """d(T^2 KL)/d(student logits) = T (p_s - p_t)."""
    out.copy_(p_s.sub_(p_t).mul_(temperature))
