"""The output head and the KL in one: logits exist only for a chunk of tokens at a time, the teacher's as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from nemo_minitron.backend.collectives import gather_first_dim, rank_and_size
from nemo_minitron.distillation.losses._per_token import Rule, check_temperature, solve
from nemo_minitron.distillation.losses._vocabulary import reshard, true_columns
from nemo_minitron.distillation.losses.forward_kl import ForwardKL

# Tokens of a chunk. Fewer make the matrix products slow, more take memory: on a CPU those of 64 cost a quarter more
# than those of all tokens at once, those of 128 no more (fp32, AVX2). On an H200 (8,192 x 128,256, bf16) those
# of 1,024, 2,048 and 4,096 take 1.24, 1.17 and 1.13 of the matrix products alone.
CHUNK = {"cpu": 128, "cuda": 2048}
MIXED = Version(torch.__version__) >= Version("2.8")  # `out_dtype` of torch's product, on CUDA alone
# Numbers of a sum in fp32 that are rounded at a time: on a CPU what stays in its cache, on a GPU few launches.
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
    group: Any = None,
    sequence_parallel: bool = False,
    main_grad_scale: float | None = None,
) -> Tensor:
    """`losses.forward_kl` of logits hidden @ weight.T, which are never there as a whole: -> [S, B], fp32.

    student_hidden [S, B, H] and student_weight [V/tp, H], of one dtype, get gradients; teacher_hidden [S, B, Ht] with
    teacher_weight [Vt/tp, Ht], or teacher_logits [S, B, Vt/tp], are constants. Weights are local shards of the
    vocabulary, as Megatron's output layer or tied embedding holds them. `sequence_parallel`: both hidden states are
    [S/tp, B, ...], gathered here, and the student's gradient is scattered again. `vocab_size`: the true vocabulary,
    where weights are padded (see `losses`); a teacher of another padding has its weight re-sharded on every call: do
    it once, with this module's `reshard`, where the weight stays.

    `loss_mask` [S, B]: what each token's loss will be multiplied by, to a constant. A token of weight 0 costs nothing:
    its logits are not computed and its loss is 0. Since the head's gradient is summed over tokens in the forward pass,
    backward refuses (RuntimeError) a gradient of the loss that is no multiple of the mask (of 1 without one).

    `main_grad_scale`: a promise that the loss's gradient will be this times the mask. The weight's gradient is then
    added to `student_weight.main_grad` (fp32, of Megatron's DDP) in the forward pass, chunk by chunk, and no tensor of
    its size is made. Backward refuses (RuntimeError) another factor; a forward pass without a backward pass leaves its
    gradient there. See `accumulates`.

    Collectives under TP: one a chunk; one for each gathered hidden state; in backward one, the all-reduce or
    reduce-scatter of the hidden state's gradient. The weight's gradient is accumulated in fp32. Memory: two chunks of
    logits, both gradients, gathered hidden states. Also raises ValueError as `losses` do.
    """
    if (teacher_logits is None) == (teacher_hidden is None or teacher_weight is None):
        raise ValueError("the teacher is either teacher_logits or teacher_hidden with teacher_weight")
    check_temperature(temperature)
    if main_grad_scale is not None and not accumulates(student_weight):
        raise ValueError("main_grad_scale wants a weight with an fp32 main_grad, as Megatron's DDP gives it")
    gathered = group if sequence_parallel and rank_and_size(group)[1] > 1 else None
    teacher = _teacher(teacher_hidden, teacher_weight, teacher_logits, student_weight, vocab_size, group, gathered)
    settings = _Settings(ForwardKL(temperature > 1), temperature, vocab_size, group, gathered, main_grad_scale)
    return _FusedHead.apply(student_hidden, student_weight, teacher, loss_mask, settings, torch.is_grad_enabled())


def accumulates(weight: Tensor) -> bool:
    """Whether the weight has what `main_grad_scale` adds to: an fp32 sum over micro-batches, whole beside it."""
    total = getattr(weight, "main_grad", None)
    return isinstance(total, Tensor) and total.dtype == torch.float32 and total.shape == weight.shape


class _Settings(NamedTuple):
    rule: Rule
    temperature: float
    vocab_size: int | None
    group: Any
    gathered: Any  # the group, where hidden states are parts of the sequence
    scale: float | None  # main_grad_scale


def _teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    logits: Tensor | None,
    student_weight: Tensor,
    vocab_size: int | None,
    group: Any,
    gathered: Any,
) -> Callable[[Any], Tensor]:
    """Rows of tokens -> the teacher's logits [n, true columns of the student's shard]."""
    width = len(student_weight)
    of = logits.flatten(0, -2).t() if weight is None else weight  # type: ignore[union-attr]
    of = of.detach()  # [Vt/tp, N] or [Vt/tp, Ht]: the vocabulary first
    for have in (width, len(of)):
        if vocab_size is not None and have * rank_and_size(group)[1] < vocab_size:
            raise ValueError(f"shards of {have} columns do not hold a vocabulary of {vocab_size}")
    if len(of) != width:
        if vocab_size is None:
            raise ValueError(f"shards of {width} and {len(of)} columns: give the true vocab_size")
        of = reshard(of, width, vocab_size, group)
    true = width if vocab_size is None else true_columns(vocab_size, width, group)
    of = of[:true]
    if weight is None:
        return lambda rows: of.t()[rows]
    states = gather_first_dim(hidden.detach(), gathered).flatten(0, -2)  # type: ignore[union-attr]
    return _Product(states, of)


class _Product:
    """Rows of states [N, H] -> states[rows] @ weight.T, chunk after chunk in one room.

    New pages cost a CPU more than it takes to fill them.
    """

    def __init__(self, states: Tensor, weight: Tensor) -> None:
        self.states, self.weight = states, weight
        self.room = states.new_empty(min(CHUNK[states.device.type], len(states)), len(weight))

    def __call__(self, rows: Any) -> Tensor:
        chunk = self.states[rows]
        return torch.mm(chunk, self.weight.t(), out=self.room[: len(chunk)])


class _FusedHead(torch.autograd.Function):
    """Both gradients are made in the forward pass, chunk by chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Callable[[Any], Tensor], loss_mask: Tensor | None,
        settings: _Settings, enabled: bool,
    ) -> Tensor:  # fmt: skip
        vocab_size, scale = settings.vocab_size, settings.scale
        states = gather_first_dim(hidden.detach(), settings.gathered)
        shape, states = states.shape[:-1], states.flatten(0, -2)
        true = len(weight) if vocab_size is None else true_columns(vocab_size, len(weight), settings.group)
        mask = None if loss_mask is None else loss_mask.reshape(-1).float()
        wants_states, wants_weight = (enabled and wanted for wanted in ctx.needs_input_grad[:2])
        d_states = torch.zeros_like(states) if wants_states else None
        total = _total(weight, scale) if wants_weight else None
        sums = d_states, None if total is None else total[:true]
        loss = _in_chunks(states, weight.detach()[:true], teacher, mask, settings, sums)
        ctx.save_for_backward(d_states, total if scale is None else None, mask)
        ctx.shape, ctx.weight, ctx.settings = (*shape, hidden.shape[-1]), (weight.shape, weight.dtype), settings
        ctx.shown = wants_weight and scale is not None and _shown(weight)
        return loss.reshape(shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_weight, mask = ctx.saved_tensors
        factor = _factor(outputs[0].reshape(-1).float(), mask, ctx.settings.scale)
        if d_weight is not None:
            d_weight = _scaled(d_weight, factor, ctx.weight[1])
        elif ctx.shown:
            d_weight = outputs[0].new_empty(ctx.weight[0], dtype=ctx.weight[1])  # Megatron's hook drops it unread
        if d_states is not None:
            d_states = d_states.mul_(factor).reshape(ctx.shape)
            d_states = _reduce(d_states, ctx.settings.group, ctx.settings.gathered)
        return d_states, d_weight, None, None, None, None


def _in_chunks(
    states: Tensor, head: Tensor, teacher: Callable[[Any], Tensor], mask: Tensor | None, settings: _Settings,
    sums: tuple[Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """The loss [N] of states [N, H]; gradients of a loss whose own is the mask go into `sums`, states' and head's."""
    d_states, d_head = sums
    loss = torch.zeros(len(states), dtype=torch.float32, device=states.device)
    student, scale = _Product(states, head), 1.0 if settings.scale is None else settings.scale
    for rows in _chunks(len(states), mask, CHUNK[states.device.type]):
        logits = student(rows)
        gradient = None if d_states is None and d_head is None else logits  # over the logits themselves
        loss[rows] = solve(settings.rule, logits, teacher(rows), settings.temperature, settings.group, gradient)
        weights = None if mask is None else mask[rows, None]
        if d_states is not None:
            d_states[rows] = _weighted(logits @ head, weights)
        if d_head is not None:
            _add_product(d_head, logits, _weighted(states[rows], weights), scale)
    return loss


def _total(weight: Tensor, scale: float | None) -> Tensor:
    """[V/tp, H], fp32: what the weight's gradient is added to."""
    if scale is None:
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    return weight.main_grad


def _shown(weight: Tensor) -> bool:
    """Whether autograd has to see a gradient of a weight whose main_grad has it already: Megatron's hook may ask.

    Not of an embedding that the same stage reads: its gradient comes from there, and is added as any other.
    """
    if getattr(weight, "zero_out_wgrad", False):  # Megatron's mark of such
        return False
    weight.grad_added_to_main_grad = True
    return True


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """[n, H] times [n, 1], in the rows' dtype."""
    return rows if weights is None else (rows * weights).to(rows.dtype)


def _chunks(tokens: int, mask: Tensor | None, step: int) -> list[Any]:
    """Slices of all tokens, or the indices of those whose weight is not 0; the same on every rank of the group."""
    if mask is None:
        return [slice(start, start + step) for start in range(0, tokens, step)]
    counted = mask.nonzero()[:, 0]
    return list(counted.split(step)) if len(counted) else []


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor, scale: float) -> None:
    """total [W, H] += scale * d_logits.T @ hidden, in fp32; no second [W, H] is needed: a GPU's product of bf16 adds to
    fp32, elsewhere it is made by blocks."""
    if d_logits.dtype == torch.float32:
        total.addmm_(d_logits.t(), hidden, alpha=scale)
        return
    if d_logits.is_cuda and MIXED:
        torch.addmm(total, d_logits.t(), hidden, alpha=scale, out_dtype=torch.float32, out=total)
        return
    for rows, columns in zip(total.split(2048), d_logits.split(2048, 1), strict=True):
        rows.add_(columns.t() @ hidden, alpha=scale)


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor; below fp32 written to the front of `total`'s own memory, so that no second [W, H] is needed."""
    if dtype == torch.float32:
        return total.mul_(factor)
    flat = total.view(-1)
    front, step = flat.view(dtype)[: flat.numel()], ROUNDED[total.device.type]
    for wide, narrow in zip(flat.split(step), front.split(step), strict=True):
        narrow.copy_(wide * factor)  # what is written lies at or before what has been read
    return front.view(total.shape)


def _factor(gradient: Tensor, mask: Tensor | None, promised: float | None) -> Tensor:
    """c in gradient = c * mask, both [N]; where the mask is 0 the loss is constant, and any gradient will do."""
    mask = torch.ones_like(gradient) if mask is None else mask
    gradient = gradient * (mask != 0)
    if promised is None:
        factor = (gradient * mask).sum() / (mask * mask).sum().clamp(min=torch.finfo(torch.float32).tiny)
    else:
        factor = gradient.new_tensor(promised)
    if len(gradient) and ((gradient - factor * mask).abs() > 1e-5 * gradient.abs().max()).any():
        wanted = "multiple of loss_mask: give each token's weight as loss_mask"
        if promised is not None:
            wanted = f"{promised:g} times loss_mask, as main_grad_scale promised: the head's gradient was added so"
        raise RuntimeError(f"the loss's gradient is no{'t' * (promised is not None)} {wanted}")
    return factor


def _reduce(partial: Tensor, group: Any, gathered: Any) -> Tensor:
    """The sum over ranks: whole on each, or each its part of the sequence."""
    if gathered is not None:
        part = partial.new_empty(partial.shape[0] // rank_and_size(gathered)[1], *partial.shape[1:])
        torch.distributed.reduce_scatter_tensor(part, partial.contiguous(), group=gathered)
        return part
    if rank_and_size(group)[1] > 1:
        torch.distributed.all_reduce(partial, group=group)
    return partial
