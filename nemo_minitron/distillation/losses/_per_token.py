"""What every loss shares: chunks of tokens, sums over the shards of the vocabulary, the gradient if it is needed.

Shapes (docs/shapes.md): N tokens, W columns of the vocabulary on this rank, M statistics of a token, R ranks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import gather_stacked, rank_and_size
from nemo_minitron.distillation.losses._vocabulary import reshard, true_columns

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from torch.distributed import ProcessGroup


# Logits of each model that are held in fp32 at a time. On a CPU so many stay in its cache.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}
KeptWork = Any  # what a rule keeps of a chunk of tokens, from its first pass to the next; each rule has its own


class Kernels(Protocol):
    """The module of a rule's kernels."""

    def usable(self, logits: Tensor) -> bool: ...

    def statistics(self, student_NW: Tensor, teacher_NW: Tensor, temperature: float) -> Tensor: ...

    def write_gradient(
        self, out_NW: Tensor, student_NW: Tensor, teacher_NW: Tensor, temperature: float, joined_MN: Tensor,
        factors_N: Tensor | None = None,
    ) -> None: ...  # fmt: skip


class Rule:
    """A loss, written as statistics of each shard of the vocabulary and as what follows from all of them.

    `s_NW` and `t_NW` are the student's and the teacher's logits over T, fp32. A rule only reads them. `scratch_3NW` is
    memory that the rule may overwrite: on a CPU fresh memory costs more than the sums. `s_NW` and `t_NW` may lie in
    scratch_3NW[0] and scratch_3NW[1]. W is 0 on a rank that holds nothing but padding.
    """

    kernels: Kernels | None = None  # both passes on a GPU
    refines = False  # whether `refine` has to be called, which is one more collective

    def measure(self, s_NW: Tensor, t_NW: Tensor, scratch_3NW: Tensor) -> tuple[Tensor, KeptWork]:
        """This shard's statistics [M, N], and whatever `refine` and `gradient` need of the chunk (`work`)."""
        raise NotImplementedError

    def combine(self, parts_RMN: Tensor, rank: int) -> Tensor:
        """The statistics of all shards -> those of the whole vocabulary [M', N]; `rank`: of this process."""
        return parts_RMN.sum(0)

    def refine(self, work: KeptWork, part_MN: Tensor, joined_MN: Tensor) -> Tensor:
        """More statistics of this shard, which need those of the whole vocabulary, [M'', N].

        They are added over the shards and stand behind the others in `joined_MN`. `work` stays as it is.
        """
        raise NotImplementedError

    def loss(self, joined_MN: Tensor) -> Tensor:
        """[N], not yet times T^2."""
        raise NotImplementedError

    def gradient(self, work: KeptWork, part_MN: Tensor, joined_MN: Tensor, out_NW: Tensor) -> None:
        """Writes d loss / d s, fp32. `out_NW` may be scratch_3NW[0] or `s_NW` itself; `work` is overwritten."""
        raise NotImplementedError


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature and its square are finite numbers above 0."""
    if not (temperature > 0 and math.isfinite(float(temperature) * float(temperature))):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")


def per_token(
    student: Tensor,
    teacher: Tensor,
    rule: Rule,
    temperature: float,
    group: ProcessGroup | None,
    vocab_size: int | None,
    in_place: bool,
) -> Tensor:
    """The loss [...] of logits [..., W]: see the package's contract."""
    check_temperature(temperature)
    compared = student.shape if vocab_size is None else student.shape[:-1]
    if compared != (teacher.shape if vocab_size is None else teacher.shape[:-1]):
        raise ValueError(f"student logits are {tuple(student.shape)}, teacher's {tuple(teacher.shape)}")
    for logits in (student, teacher):
        if vocab_size is not None and logits.shape[-1] * rank_and_size(group)[1] < vocab_size:
            raise ValueError(f"shards of {logits.shape[-1]} columns do not hold a vocabulary of {vocab_size}")
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    return _PerToken.apply(student, teacher.detach(), rule, temperature, group, vocab_size, in_place, needs_gradient)


class _PerToken(torch.autograd.Function):
    """The gradient is computed in the forward pass, in the logits' own dtype, and scaled in the backward pass.

    With kernels it is computed and scaled in the backward pass: the logits are kept until then in any case, and the
    kernel writes the gradient over them as it reads them. That saves two passes over memory.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        rule: Rule,
        temperature: float,
        group: ProcessGroup | None,
        vocab_size: int | None,
        in_place: bool,
        needs_gradient: bool,
    ) -> Tensor:
        shape, width = student.shape[:-1], student.shape[-1]
        tokens = shape.numel()  # not -1: a rank may hold no column at all
        s_NW, t_NW = student.detach().reshape(tokens, width), teacher.reshape(tokens, teacher.shape[-1])
        true_width = width if vocab_size is None else true_columns(vocab_size, width, group)
        if vocab_size is not None:
            same_padding = t_NW.shape[1] == width
            t_NW = t_NW[:, :true_width] if same_padding else reshard(t_NW.t(), width, vocab_size, group).t()
        ctx.shape, ctx.kernels = student.shape, _kernels_for(rule, student)
        if ctx.kernels is not None:
            joined_MN = _joined_by_kernels(ctx.kernels, rule, s_NW[:, :true_width], t_NW, temperature, group)
            if needs_gradient:
                ctx.save_for_backward(student, t_NW, joined_MN)
                ctx.settings = true_width, temperature, in_place
            return (rule.loss(joined_MN) * temperature**2).reshape(shape)
        gradient_NW = (s_NW if in_place else torch.empty_like(s_NW)) if needs_gradient else None
        true_gradient_NW = None if gradient_NW is None else gradient_NW[:, :true_width]
        loss_N = loss_and_gradient(rule, s_NW[:, :true_width], t_NW, temperature, group, true_gradient_NW)
        if gradient_NW is not None:
            gradient_NW[:, true_width:].zero_()
            ctx.save_for_backward(gradient_NW)
        return loss_N.reshape(shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors_N = outputs[0].reshape(-1)
        if ctx.kernels is None:
            (gradient_NW,) = ctx.saved_tensors
            # In place: autograd's version check then refuses a second backward pass, which would be wrong.
            scale_rows(gradient_NW, factors_N[:, None])
        else:
            gradient_NW = _gradient_by_kernels(ctx, factors_N)
        return gradient_NW.reshape(ctx.shape), *[None] * 7


def _gradient_by_kernels(ctx: FunctionCtx, factors_N: Tensor) -> Tensor:
    """The gradient [N, W] of a loss that is multiplied by the factors."""
    student, t_NW, joined_MN = ctx.saved_tensors
    true_width, temperature, in_place = ctx.settings
    s_NW = student.detach().reshape(len(factors_N), student.shape[-1])
    gradient_NW = s_NW if in_place else torch.empty_like(s_NW)
    factors_N = factors_N.float().contiguous()
    true_s_NW, out_NW = s_NW[:, :true_width], gradient_NW[:, :true_width]
    ctx.kernels.write_gradient(out_NW, true_s_NW, t_NW, temperature, joined_MN, factors_N)
    if true_width < gradient_NW.shape[1]:
        gradient_NW[:, true_width:].zero_()
    # Autograd does not see what a kernel writes. With this a second backward pass in place is refused, too.
    torch.autograd.graph.increment_version(gradient_NW)
    return gradient_NW


def scale_rows(gradient_NW: Tensor, factors_N1: Tensor) -> None:
    """Multiplies in place: the product is in fp32 and rounded once. By chunks, because torch makes a copy there."""
    tokens = _tokens_of_a_chunk(gradient_NW)
    for rows_NW, factor_N1 in zip(gradient_NW.split(tokens), factors_N1.split(tokens), strict=True):
        rows_NW.mul_(factor_N1)


def _tokens_of_a_chunk(logits_NW: Tensor) -> int:
    return max(1, CHUNK[logits_NW.device.type] // max(logits_NW.shape[1], 1))


def loss_and_gradient(
    rule: Rule,
    student_NW: Tensor,
    teacher_NW: Tensor,
    temperature: float,
    group: ProcessGroup | None,
    gradient_NW: Tensor | None,
) -> Tensor:
    """Logits -> the loss [N], fp32, T^2 included. Writes d loss / d student into `gradient_NW`.

    `gradient_NW` may be `student_NW` itself. One collective under TP, or two if the rule refines.
    """
    kernels = _kernels_for(rule, student_NW)
    if kernels is not None:
        joined_MN = _joined_by_kernels(kernels, rule, student_NW, teacher_NW, temperature, group)
        if gradient_NW is not None:
            kernels.write_gradient(gradient_NW, student_NW, teacher_NW, temperature, joined_MN)
        return rule.loss(joined_MN) * temperature**2
    step = _tokens_of_a_chunk(student_NW)
    chunks = [slice(start, start + step) for start in range(0, max(len(student_NW), 1), step)]
    run = _ChunkRun(rule, student_NW, teacher_NW, temperature, group, gradient_NW)
    if rank_and_size(group)[1] > 1:  # all chunks share one collective, and are read again for the gradient
        return run(chunks)
    return torch.cat([run([chunk]) for chunk in chunks])


def _kernels_for(rule: Rule, student: Tensor) -> Kernels | None:
    """The rule's kernels, if they can run on these logits."""
    return rule.kernels if rule.kernels is not None and rule.kernels.usable(student) else None


def _joined_by_kernels(
    kernels: Kernels, rule: Rule, student_NW: Tensor, teacher_NW: Tensor, temperature: float, group: ProcessGroup | None
) -> Tensor:
    """The statistics of the whole vocabulary, [M, N]."""
    part_MN = kernels.statistics(student_NW, teacher_NW, temperature)
    return rule.combine(gather_stacked(part_MN, group), rank_and_size(group)[0])


class _ChunkRun:
    """Takes some chunks of tokens from logits to loss and gradient. They share the collectives."""

    def __init__(
        self, rule: Rule, student_NW: Tensor, teacher_NW: Tensor, temperature: float, group: ProcessGroup | None,
        gradient_NW: Tensor | None,
    ) -> None:  # fmt: skip
        self.rule, self.student_NW, self.teacher_NW = rule, student_NW, teacher_NW
        self.temperature, self.group, self.gradient_NW = temperature, group, gradient_NW
        tokens, width = min(_tokens_of_a_chunk(student_NW), len(student_NW)), student_NW.shape[1]
        self.scratch_3NW = torch.empty(3, tokens, width, dtype=torch.float32, device=student_NW.device)

    def measure(self, chunk: slice) -> tuple[Tensor, KeptWork]:
        scratch_3NW = self.scratch_3NW[:, : len(self.student_NW[chunk])]
        s_NW = self._read(self.student_NW[chunk], scratch_3NW[0])
        t_NW = self._read(self.teacher_NW[chunk], scratch_3NW[1])
        return self.rule.measure(s_NW, t_NW, scratch_3NW)

    def _read(self, logits_NW: Tensor, scratch_NW: Tensor) -> Tensor:
        """The logits over T in fp32, each row contiguous. Copied into `scratch_NW` unless they are so already."""
        if logits_NW.dtype == torch.float32 and self.temperature == 1 and logits_NW.stride(1) == 1:
            return logits_NW
        scratch_NW.copy_(logits_NW)
        return scratch_NW if self.temperature == 1 else scratch_NW.div_(self.temperature)

    def __call__(self, chunks: list[slice]) -> Tensor:
        rule, rank = self.rule, rank_and_size(self.group)[0]
        if len(chunks) == 1:
            part_MN, kept_work = self.measure(chunks[0])
            parts = [part_MN]
        else:  # the fp32 copy of a chunk is made again: keeping all of them would cost too much memory
            parts, kept_work = [self.measure(chunk)[0] for chunk in chunks], None

        def work_of(chunk: slice) -> KeptWork:
            return self.measure(chunk)[1] if kept_work is None else kept_work

        tokens = [part_MN.shape[1] for part_MN in parts]
        joined_MN = rule.combine(gather_stacked(torch.cat(parts, 1), self.group), rank)
        if rule.refines:
            split = zip(chunks, parts, joined_MN.split(tokens, 1), strict=True)
            refined = [rule.refine(work_of(chunk), *statistics) for chunk, *statistics in split]
            joined_MN = torch.cat([joined_MN, gather_stacked(torch.cat(refined, 1), self.group).sum(0)])
        if self.gradient_NW is not None:
            for chunk, part_MN, chunk_MN in zip(chunks, parts, joined_MN.split(tokens, 1), strict=True):
                self._write_gradient(self.gradient_NW[chunk], work_of(chunk), part_MN, chunk_MN)
        return rule.loss(joined_MN) * self.temperature**2

    def _write_gradient(self, gradient_NW: Tensor, work: KeptWork, part_MN: Tensor, joined_MN: Tensor) -> None:
        in_fp32 = gradient_NW.dtype == torch.float32
        out_NW = gradient_NW if in_fp32 else self.scratch_3NW[0, : len(gradient_NW)]
        self.rule.gradient(work, part_MN, joined_MN, out_NW)
        if self.temperature != 1:
            out_NW.mul_(self.temperature)
        if out_NW is not gradient_NW:
            gradient_NW.copy_(out_NW)
