"""The output head and the KL in one: logits exist for one chunk of tokens at a time, the student's and the teacher's.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, N tokens, W columns of the vocabulary on this rank,
H hidden size, U the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Union

import torch
from packaging.version import Version
from torch import Tensor

from nemo_minitron.backend.collectives import gather_first_dim, rank_and_size
from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, loss_and_gradient
from nemo_minitron.distillation.losses._vocabulary import reshard, true_columns
from nemo_minitron.distillation.losses.forward_kl import ForwardKL

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx
    from torch.distributed import ProcessGroup


# Tokens of a chunk. Fewer make the matrix products slow, and more take memory. On a CPU (fp32, AVX2) chunks of 64 cost
# a quarter more than all tokens at once, and chunks of 128 cost no more. On an H200 (8,192 x 128,256, bf16) chunks of
# 1,024, 2,048 and 4,096 take 1.24, 1.17 and 1.13 times as long as the matrix products alone.
CHUNK = {"cpu": 128, "cuda": 2048}
MIXED = Version(torch.__version__) >= Version("2.8")  # torch's product has `out_dtype`, on CUDA only
# Numbers of a sum in fp32 that are rounded at a time. On a CPU so many stay in its cache; on a GPU launches are few.
ROUNDED = {"cpu": 1 << 18, "cuda": 1 << 24}


def fused_forward_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad_scale: float | None = None,
) -> Tensor:
    """`losses.forward_kl` of the logits hidden @ weight.T, which never exist as a whole: -> [S, B], fp32.

    `student_hidden` [S, B, H] and `student_weight` [V/tp, H] have one dtype and get gradients. The teacher is constant:
    either `teacher_hidden` [S, B, U] with `teacher_weight` [V/tp, U], or `teacher_logits` [S, B, V/tp]. Weights are
    local shards of the vocabulary, as Megatron's output layer or tied embedding holds them. `sequence_parallel`: both
    hidden states are [S/tp, B, ...]; they are gathered here, and the student's gradient is scattered again.
    `vocab_size`: the true vocabulary, if weights are padded (see `losses`). If the teacher is padded differently, its
    weight is re-sharded on every call. To do that only once, give a weight that `reshard` of this module has made.

    `loss_mask` [S, B]: what each token's loss will be multiplied by, up to a constant. A token of weight 0 costs
    nothing: its logits are not computed and its loss is 0. The head's gradient is summed over tokens in the forward
    pass. So the backward pass raises RuntimeError if the gradient of the loss is no multiple of the mask (or of 1,
    without a mask).

    `main_grad_scale`: a promise that the loss's gradient will be this number times the mask. The weight's gradient is
    then added to `student_weight.main_grad` (fp32, of Megatron's DDP) in the forward pass, chunk by chunk, and no
    tensor of its size is made. The backward pass raises RuntimeError for another factor. After a forward pass without a
    backward pass the gradient stays in main_grad. `accumulates` says which weights can do this.

    Collectives under TP: one a chunk, one for each hidden state that is gathered, and in the backward pass one, the
    all-reduce or reduce-scatter of the hidden state's gradient. The weight's gradient is accumulated in fp32. Memory:
    two chunks of logits, both gradients, and the gathered hidden states. Raises ValueError as `losses` do.
    """
    if (teacher_logits is None) == (teacher_hidden is None or teacher_weight is None):
        raise ValueError("the teacher is either teacher_logits or teacher_hidden with teacher_weight")
    check_temperature(temperature)
    if main_grad_scale is not None and not accumulates(student_weight):
        raise ValueError("main_grad_scale needs a weight with an fp32 main_grad, as Megatron's DDP gives it")
    sequence_group = group if sequence_parallel and rank_and_size(group)[1] > 1 else None
    settings = _Settings(ForwardKL(temperature > 1), temperature, vocab_size, group, sequence_group, main_grad_scale)
    teacher = _teacher(teacher_hidden, teacher_weight, teacher_logits, len(student_weight), settings)
    return _FusedHead.apply(student_hidden, student_weight, teacher, loss_mask, settings, torch.is_grad_enabled())


def accumulates(weight: Tensor) -> bool:
    """Whether `main_grad_scale` can add to the weight's main_grad: an fp32 tensor of the weight's own shape."""
    total = getattr(weight, "main_grad", None)
    return isinstance(total, Tensor) and total.dtype == torch.float32 and total.shape == weight.shape


Rows = Union[slice, Tensor]  # some of the tokens
TeacherLogits = Callable[[Rows], Tensor]  # -> logits [N, W] of those tokens


class _Settings(NamedTuple):
    rule: Rule
    temperature: float
    vocab_size: int | None
    group: ProcessGroup | None
    sequence_group: ProcessGroup | None  # the group, if hidden states are parts of the sequence; else None
    scale: float | None  # main_grad_scale

    def true_columns(self, width: int) -> int:
        return width if self.vocab_size is None else true_columns(self.vocab_size, width, self.group)


def _teacher(
    hidden_SBU: Tensor | None, weight_WU: Tensor | None, logits_SBW: Tensor | None, width: int, settings: _Settings
) -> TeacherLogits:
    """-> a function from rows of tokens to the teacher's logits [N, true columns of the student's shard].

    `width`: the columns of the student's shard, with its padding.
    """
    # Vocabulary first, also for logits: then one re-sharding serves both.
    head = logits_SBW.flatten(0, -2).t() if weight_WU is None else weight_WU  # type: ignore[union-attr]
    head = head.detach()
    vocab_size, group = settings.vocab_size, settings.group
    for columns in (width, len(head)):
        if vocab_size is not None and columns * rank_and_size(group)[1] < vocab_size:
            raise ValueError(f"shards of {columns} columns do not hold a vocabulary of {vocab_size}")
    if len(head) != width:
        if vocab_size is None:
            raise ValueError(f"shards of {width} and {len(head)} columns: give the true vocab_size")
        head = reshard(head, width, vocab_size, group)
    head = head[: settings.true_columns(width)]
    if weight_WU is None:
        return lambda rows: head.t()[rows]
    hidden = gather_first_dim(hidden_SBU.detach(), settings.sequence_group)  # type: ignore[union-attr]
    return _Product(hidden.flatten(0, -2), head)


class _Product:
    """Rows of hidden states -> their logits [N, W], each chunk in the same memory.

    On a CPU new memory costs more than filling it.
    """

    def __init__(self, hidden_NH: Tensor, weight_WH: Tensor) -> None:
        self.hidden_NH, self.weight_WH = hidden_NH, weight_WH
        tokens = min(CHUNK[hidden_NH.device.type], len(hidden_NH))
        self.logits_NW = hidden_NH.new_empty(tokens, len(weight_WH))

    def __call__(self, rows: Rows) -> Tensor:
        chunk_NH = self.hidden_NH[rows]
        return torch.mm(chunk_NH, self.weight_WH.t(), out=self.logits_NW[: len(chunk_NH)])


class _FusedHead(torch.autograd.Function):
    """Both gradients are computed in the forward pass, chunk by chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_SBH: Tensor, weight_WH: Tensor, teacher: TeacherLogits, mask_SB: Tensor | None,
        settings: _Settings, enabled: bool,
    ) -> Tensor:  # fmt: skip
        gathered_SBH = gather_first_dim(hidden_SBH.detach(), settings.sequence_group)
        shape, hidden_NH = gathered_SBH.shape[:-1], gathered_SBH.flatten(0, -2)
        true_width = settings.true_columns(len(weight_WH))
        mask_N = None if mask_SB is None else mask_SB.reshape(-1).float()
        for_hidden, for_weight = (enabled and needed for needed in ctx.needs_input_grad[:2])
        d_hidden_NH = torch.zeros_like(hidden_NH) if for_hidden else None
        total_WH = _total(weight_WH, settings.scale) if for_weight else None
        sums = d_hidden_NH, None if total_WH is None else total_WH[:true_width]
        loss_N = _in_chunks(hidden_NH, weight_WH.detach()[:true_width], teacher, mask_N, settings, sums)
        ctx.save_for_backward(d_hidden_NH, total_WH if settings.scale is None else None, mask_N)
        ctx.shape, ctx.settings = (*shape, hidden_SBH.shape[-1]), settings
        ctx.weight = weight_WH.shape, weight_WH.dtype
        ctx.shows_weight = for_weight and settings.scale is not None and _mark_as_added(weight_WH)
        return loss_N.reshape(shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight_WH, mask_N = ctx.saved_tensors
        factor = _factor(outputs[0].reshape(-1).float(), mask_N, ctx.settings.scale)
        if d_weight_WH is not None:
            d_weight_WH = _scaled(d_weight_WH, factor, ctx.weight[1])
        elif ctx.shows_weight:  # Megatron's hook drops it without reading it
            d_weight_WH = outputs[0].new_empty(ctx.weight[0], dtype=ctx.weight[1])
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(factor).reshape(ctx.shape)
            d_hidden = _sum_over_ranks(d_hidden, ctx.settings.group, ctx.settings.sequence_group)
        return d_hidden, d_weight_WH, None, None, None, None


def _in_chunks(
    hidden_NH: Tensor, head_WH: Tensor, teacher: TeacherLogits, mask_N: Tensor | None, settings: _Settings,
    sums: tuple[Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """-> the loss [N]. `sums`: the hidden states' gradient and the head's, of a loss whose gradient is the mask; the
    first is written, the second is added to."""
    d_hidden_NH, d_head_WH = sums
    loss_N = torch.zeros(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
    student, scale = _Product(hidden_NH, head_WH), 1.0 if settings.scale is None else settings.scale
    for rows in _chunks(len(hidden_NH), mask_N, CHUNK[hidden_NH.device.type]):
        logits_NW = student(rows)
        # The gradient is written over the logits themselves.
        gradient_NW = None if d_hidden_NH is None and d_head_WH is None else logits_NW
        loss_N[rows] = loss_and_gradient(
            settings.rule, logits_NW, teacher(rows), settings.temperature, settings.group, gradient_NW
        )
        weights_N1 = None if mask_N is None else mask_N[rows, None]
        if d_hidden_NH is not None:
            d_hidden_NH[rows] = _weighted(logits_NW @ head_WH, weights_N1)
        if d_head_WH is not None:
            _add_product(d_head_WH, logits_NW, _weighted(hidden_NH[rows], weights_N1), scale)
    return loss_N


def _total(weight_WH: Tensor, scale: float | None) -> Tensor:
    """fp32 [W, H]: what the weight's gradient is added to."""
    if scale is None:
        return torch.zeros(weight_WH.shape, dtype=torch.float32, device=weight_WH.device)
    return weight_WH.main_grad


def _mark_as_added(weight: Tensor) -> bool:
    """Tells Megatron that main_grad has the gradient already. -> whether autograd must still see some gradient.

    Megatron's hook runs only if it does. It must not if the same stage also reads the weight as an embedding: that
    gradient runs the hook, and is added as any other.
    """
    if getattr(weight, "zero_out_wgrad", False):  # Megatron's mark of a weight that is also an embedding
        return False
    weight.grad_added_to_main_grad = True
    return True


def _weighted(rows_NH: Tensor, weights_N1: Tensor | None) -> Tensor:
    """The product, in the rows' dtype."""
    return rows_NH if weights_N1 is None else (rows_NH * weights_N1).to(rows_NH.dtype)


def _chunks(tokens: int, mask_N: Tensor | None, step: int) -> Sequence[Rows]:
    """Slices of all tokens, or the indices of those whose weight is not 0. The same on every rank of the group."""
    if mask_N is None:
        return [slice(start, start + step) for start in range(0, tokens, step)]
    counted = mask_N.nonzero()[:, 0]
    return list(counted.split(step)) if len(counted) else []


def _add_product(total_WH: Tensor, d_logits_NW: Tensor, hidden_NH: Tensor, scale: float) -> None:
    """total_WH += scale * d_logits_NW.T @ hidden_NH, in fp32, without a second tensor of its size.

    A GPU's product of bf16 can add to fp32. Elsewhere the product is made by blocks.
    """
    if d_logits_NW.dtype == torch.float32:
        total_WH.addmm_(d_logits_NW.t(), hidden_NH, alpha=scale)
        return
    if d_logits_NW.is_cuda and MIXED:
        torch.addmm(total_WH, d_logits_NW.t(), hidden_NH, alpha=scale, out_dtype=torch.float32, out=total_WH)
        return
    for rows_WH, columns_NW in zip(total_WH.split(2048), d_logits_NW.split(2048, 1), strict=True):
        rows_WH.add_(columns_NW.t() @ hidden_NH, alpha=scale)


def _scaled(total_WH: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total_WH * factor in the dtype. Below fp32 it is written to the front of `total_WH`'s own memory, so that no
    second tensor of its size is needed."""
    if dtype == torch.float32:
        return total_WH.mul_(factor)
    flat = total_WH.view(-1)
    front, step = flat.view(dtype)[: flat.numel()], ROUNDED[total_WH.device.type]
    for wide, narrow in zip(flat.split(step), front.split(step), strict=True):
        narrow.copy_(wide * factor)  # it lies at or in front of what has been read
    return front.view(total_WH.shape)


def _factor(gradient_N: Tensor, mask_N: Tensor | None, promised: float | None) -> Tensor:
    """The c of gradient = c * mask. Where the mask is 0 the loss is constant, so any gradient will do there."""
    mask_N = torch.ones_like(gradient_N) if mask_N is None else mask_N
    gradient_N = gradient_N * (mask_N != 0)
    if promised is None:
        factor = (gradient_N * mask_N).sum() / (mask_N * mask_N).sum().clamp(min=torch.finfo(torch.float32).tiny)
    else:
        factor = gradient_N.new_tensor(promised)
    if len(gradient_N) and ((gradient_N - factor * mask_N).abs() > 1e-5 * gradient_N.abs().max()).any():
        if promised is None:
            raise RuntimeError("the loss's gradient is no multiple of loss_mask: give each token's weight as loss_mask")
        raise RuntimeError(
            f"the loss's gradient is not {promised:g} times loss_mask, as main_grad_scale promised: the head's "
            "gradient was added with that factor"
        )
    return factor


def _sum_over_ranks(partial: Tensor, group: ProcessGroup | None, sequence_group: ProcessGroup | None) -> Tensor:
    """The sum over ranks: every rank gets all of it, or its own part of the sequence."""
    if sequence_group is not None:
        part = partial.new_empty(partial.shape[0] // rank_and_size(sequence_group)[1], *partial.shape[1:])
        torch.distributed.reduce_scatter_tensor(part, partial.contiguous(), group=sequence_group)
        return part
    if rank_and_size(group)[1] > 1:
        torch.distributed.all_reduce(partial, group=group)
    return partial
