"""What every loss shares: chunks of tokens, sums over the shards of the vocabulary, the gradient where it is wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import gather_stacked, rank_and_size
from nemo_minitron.distillation.losses._vocabulary import reshard, true_columns

# Logits that are held in fp32 at a time, for each model: on a CPU what stays in its cache.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}


class Rule:
    """A loss as sums over the vocabulary and what follows from them, for n tokens on one shard of W columns.

    `s` and `t` are fp32 [n, W], logits over T, to be read alone; `room` [3, n, W] is the rule's own, for new pages cost
    a CPU more than the sums. They may lie in room[0] and room[1]. W may be 0: a rank of padding alone.
    """

    kernels: Any = None  # a module with `usable`, `statistics` and `write_gradient`: both passes on a GPU
    refines = False  # whether `refine` has to be called: one more collective

    def measure(self, s: Tensor, t: Tensor, room: Tensor) -> tuple[Tensor, Any]:
        """This shard's part [k, n], and whatever `refine` and `gradient` want of the chunk."""
        raise NotImplementedError

    def combine(self, parts: Tensor, rank: int) -> Tensor:
        """The parts of all shards [tp, k, n] -> what holds for the whole vocabulary [m, n]."""
        return parts.sum(0)

    def refine(self, work: Any, part: Tensor, whole: Tensor) -> Tensor:
        """A second sum [j, n], which needs the first; added over the shards and put behind `whole`. Leaves `work`."""
        raise NotImplementedError

    def loss(self, whole: Tensor) -> Tensor:
        """[n], not yet times T^2."""
        raise NotImplementedError

    def gradient(self, work: Any, part: Tensor, whole: Tensor, out: Tensor) -> None:
        """d loss / d s into `out` [n, W], fp32, which may be room[0] or `s` itself; `work` is spent."""
        raise NotImplementedError


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is a number above 0 whose square is one too."""
    if not (temperature > 0 and math.isfinite(float(temperature) * float(temperature))):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")


def per_token(
    student: Tensor,
    teacher: Tensor,
    rule: Rule,
    temperature: float,
    group: Any,
    vocab_size: int | None,
    in_place: bool,
) -> Tensor:
    """The loss [...] of logits [..., W]: see the package's contract."""
    check_temperature(temperature)
    same = student.shape if vocab_size is None else student.shape[:-1]
    if same != (teacher.shape if vocab_size is None else teacher.shape[:-1]):
        raise ValueError(f"student logits are {tuple(student.shape)}, teacher's {tuple(teacher.shape)}")
    for logits in (student, teacher):
        if vocab_size is not None and logits.shape[-1] * rank_and_size(group)[1] < vocab_size:
            raise ValueError(f"shards of {logits.shape[-1]} columns do not hold a vocabulary of {vocab_size}")
    wanted = torch.is_grad_enabled() and student.requires_grad
    return _PerToken.apply(student, teacher.detach(), rule, temperature, group, vocab_size, in_place, wanted)


class _PerToken(torch.autograd.Function):
    """The gradient is computed in the forward pass, in the logits' own dtype, and scaled in the backward pass.

    By kernels it is computed in the backward pass, scaled at once: the logits, which are read again, are there till
    then, and it is written where they are read; two passes over memory less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        rule: Rule,
        temperature: float,
        group: Any,
        vocab_size: int | None,
        in_place: bool,
        wanted: bool,
    ) -> Tensor:
        shape, width = student.shape[:-1], student.shape[-1]
        rows = shape.numel()  # not -1: a rank may hold no column at all
        s, t = student.detach().reshape(rows, width), teacher.reshape(rows, teacher.shape[-1])
        true = width if vocab_size is None else true_columns(vocab_size, width, group)
        if vocab_size is not None:
            t = reshard(t.t(), width, vocab_size, group).t() if t.shape[1] != width else t[:, :true]
        ctx.shape, ctx.late = student.shape, rule.kernels if _by_kernels(rule, student) else None
        if ctx.late is not None:
            whole = _measured(rule, s[:, :true], t, temperature, group)
            if wanted:
                ctx.save_for_backward(student, t, whole)
                ctx.settings = true, temperature, in_place
            return (rule.loss(whole) * temperature**2).reshape(shape)
        gradient = (s if in_place else torch.empty_like(s)) if wanted else None
        inner = None if gradient is None else gradient[:, :true]
        loss = solve(rule, s[:, :true], t, temperature, group, inner)
        if gradient is not None:
            gradient[:, true:].zero_()
            ctx.save_for_backward(gradient)
        return loss.reshape(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = outputs[0].reshape(-1)
        if ctx.late is None:
            (gradient,) = ctx.saved_tensors
            # In place: autograd's version check refuses a second backward rather than give a wrong one.
            scale_rows(gradient, factors[:, None])
        else:
            gradient = _late(ctx, factors)
        return gradient.reshape(ctx.shape), *[None] * 7


def _late(ctx: Any, factors: Tensor) -> Tensor:
    """The gradient [rows, W] by the kernels, of a loss that is multiplied by `factors` [rows]."""
    student, t, whole = ctx.saved_tensors
    true, temperature, in_place = ctx.settings
    s = student.detach().reshape(len(factors), student.shape[-1])
    gradient = s if in_place else torch.empty_like(s)
    ctx.late.write_gradient(gradient[:, :true], s[:, :true], t, temperature, whole, factors.float().contiguous())
    if true < gradient.shape[1]:
        gradient[:, true:].zero_()
    torch.autograd.graph.increment_version(gradient)  # kernels do not: in place, a second backward is refused
    return gradient


def scale_rows(gradient: Tensor, factors: Tensor) -> None:
    """[rows, W] times [rows, 1] in place: the product in fp32 and rounded once, by chunks since torch copies there."""
    for part, factor in zip(gradient.split(_step(gradient)), factors.split(_step(gradient)), strict=True):
        part.mul_(factor)


def _step(logits: Tensor) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK[logits.device.type] // max(logits.shape[1], 1))


def solve(
    rule: Rule, student: Tensor, teacher: Tensor, temperature: float, group: Any, gradient: Tensor | None
) -> Tensor:
    """Logits [rows, W] -> loss [rows], fp32, T^2 included; writes d loss / d student into `gradient` [rows, W].

    `gradient` may be `student` itself. One collective under TP, or two where the rule refines.
    """
    if _by_kernels(rule, student):
        whole = _measured(rule, student, teacher, temperature, group)
        if gradient is not None:
            rule.kernels.write_gradient(gradient, student, teacher, temperature, whole)
        return rule.loss(whole) * temperature**2
    step = _step(student)
    chunks = [slice(start, start + step) for start in range(0, max(len(student), 1), step)]
    run = _Run(rule, student, teacher, temperature, group, gradient)
    if rank_and_size(group)[1] > 1:  # all chunks share the collective, and are read again for the gradient
        return run(chunks)
    return torch.cat([run([at]) for at in chunks])


def _by_kernels(rule: Rule, student: Tensor) -> bool:
    return rule.kernels is not None and rule.kernels.usable(student)


def _measured(rule: Rule, student: Tensor, teacher: Tensor, temperature: float, group: Any) -> Tensor:
    """By kernels: what holds for the whole vocabulary, [m, rows]."""
    part = rule.kernels.statistics(student, teacher, temperature)
    return rule.combine(gather_stacked(part, group), rank_and_size(group)[0])


class _Run:
    """Some chunks from logits to loss and gradient, with the collectives once for all of them."""

    def __init__(
        self, rule: Rule, student: Tensor, teacher: Tensor, temperature: float, group: Any, gradient: Tensor | None
    ) -> None:
        self.rule, self.student, self.teacher = rule, student, teacher
        self.temperature, self.group, self.gradient = temperature, group, gradient
        rows, width = min(_step(student), len(student)), student.shape[1]
        self.room = torch.empty(3, rows, width, dtype=torch.float32, device=student.device)

    def measure(self, at: slice) -> tuple[Tensor, Any]:
        room = self.room[:, : len(self.student[at])]
        return self.rule.measure(self._read(self.student[at], room[0]), self._read(self.teacher[at], room[1]), room)

    def _read(self, logits: Tensor, room: Tensor) -> Tensor:
        """In fp32, over the temperature, rows in one piece: in `room`, but for logits that are so already."""
        if logits.dtype == torch.float32 and self.temperature == 1 and logits.stride(1) == 1:
            return logits
        room.copy_(logits)
        return room if self.temperature == 1 else room.div_(self.temperature)

    def __call__(self, chunks: list[slice]) -> Tensor:
        rule, rank = self.rule, rank_and_size(self.group)[0]
        if len(chunks) == 1:
            part, kept = self.measure(chunks[0])
            parts = [part]
        else:  # a chunk's fp32 copy is made again rather than kept
            parts, kept = [self.measure(at)[0] for at in chunks], None

        def work(at: slice) -> Any:
            return self.measure(at)[1] if kept is None else kept

        whole = rule.combine(gather_stacked(torch.cat(parts, 1), self.group), rank)
        split = whole.split([part.shape[1] for part in parts], 1)
        if rule.refines:
            second = [rule.refine(work(at), *of) for at, *of in zip(chunks, parts, split, strict=True)]
            whole = torch.cat([whole, gather_stacked(torch.cat(second, 1), self.group).sum(0)])
            split = whole.split([part.shape[1] for part in parts], 1)
        if self.gradient is not None:
            for at, part, of in zip(chunks, parts, split, strict=True):
                gradient = self.gradient[at]
                out = gradient if gradient.dtype == torch.float32 else self.room[0, : len(gradient)]
                rule.gradient(work(at), part, of, out)
                if self.temperature != 1:
                    out.mul_(self.temperature)
                if out is not gradient:
                    gradient.copy_(out)
        return rule.loss(whole) * self.temperature**2
