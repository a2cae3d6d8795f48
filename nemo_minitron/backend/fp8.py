"""FP8 without Transformer Engine: its scaling and its rounding, in the linear layers of the reference twin.

The operands of a matrix product are rounded to the FP8 values that Transformer Engine would multiply. The product
itself is in fp32, because tensor cores sum in fp32. Norms, attention, embeddings and the output head stay as they are.
It shows what FP8 does to numbers, not how fast it is. The result may depend on the layout, because a scale per tensor
is one per shard.

Shapes (docs/shapes.md): N tokens, D input channels of a linear layer, O its output channels, X any dimensions. Here
they are those of this rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.precisions import EMULATED, HISTORY

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HYBRID = {"input": E4M3, "weight": E4M3, "gradient": E5M2}
BLOCK = 128


def scale_of(
    amax: Tensor, dtype: torch.dtype, *, otherwise: Tensor | float = 1.0, power_of_two: bool = False
) -> Tensor:
    """fp32, of amax's shape: the factor that takes `amax` to the largest value of an FP8 dtype.

    It is `otherwise` where amax is 0 or not finite. `power_of_two`: rounded down to a power of two, as for blocks.
    """
    # As a tensor, because a Python number divided by a tensor is rounded twice.
    most = torch.full_like(amax, torch.finfo(dtype).max, dtype=torch.float32)
    scale = (most / amax.float()).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        exponent = torch.frexp(scale).exponent - 1
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in an FP8 dtype. Larger numbers become the largest value; the cast alone would make them infinite."""
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: the numbers that the FP8 values of x stand for."""
    return quantize(x, scale, dtype).float() * scale.reciprocal()


def rounded_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (two dimensions), rounded to E4M3 with one scale, a power of two, for each block of rows x columns.

    Blocks at the ends may be smaller.
    """
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    values = rounded(blocks, scale_of(amax, E4M3, power_of_two=True), E4M3)
    return values.view(padded.shape)[:height, :width]


class Scaling(Protocol):
    """How the operands of a linear layer's products are rounded."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        """x of two dimensions -> fp32 for a product that sums over its second dimension, and for one that sums over
        its first (needed only if `summed`).

        `role`: input [N, D], weight [O, D] or gradient (of the output) [N, O].
        """


class Current:
    """One scale a tensor, from its own largest magnitude: fp8-current, Megatron's `tensorwise`."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        values = rounded(x, scale_of(_amax(x), HYBRID[role]), HYBRID[role])
        return values, values


class Blocks:
    """One scale for 128 values of an activation or a gradient, along the summed dimension; for 128 x 128 of a
    weight."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        if role == "weight":
            values = rounded_blocks(x, BLOCK, BLOCK)
            return values, values
        values = rounded_blocks(x, 1, BLOCK)
        return values, rounded_blocks(x, BLOCK, 1) if summed else values


class Delayed:
    """One scale a tensor, from the largest magnitude of the passes before this one: fp8-delayed.

    The state belongs to one module: the largest magnitudes of the last `length` passes, over all ranks of Megatron's
    amax reduction group. The first pass takes its own magnitude; Transformer Engine starts at scale 1. Scales move in
    every pass, so that a frozen model can be measured; Transformer Engine moves them only if gradients are enabled. The
    state is not saved, so a resumed run begins with a first pass again.
    """

    def __init__(self, length: int = HISTORY, group: Any = None) -> None:
        self.length, self.group = length, group
        self.history: dict[str, Tensor] = {}  # role -> [length] fp32, a ring
        self.scales: dict[str, Tensor] = {}
        self.passes: dict[str, int] = {}

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        amax = _amax(x)
        if self.group is not None:
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=self.group)
        if role not in self.scales:
            self.history[role] = amax.new_zeros(self.length)
            self.scales[role], self.passes[role] = scale_of(amax, HYBRID[role]), 0
        values = rounded(x, self.scales[role], HYBRID[role])
        self._remember(amax, role)
        return values, values

    def _remember(self, amax: Tensor, role: str) -> None:
        history = self.history[role]
        history[self.passes[role] % self.length] = amax
        self.passes[role] += 1
        self.scales[role] = scale_of(history.max(), HYBRID[role], otherwise=self.scales[role])


def _amax(x: Tensor) -> Tensor:
    """fp32 scalar. 0 if x has no element, as for an expert without tokens."""
    return x.detach().abs().max().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def scaling_for(config: Any) -> Scaling | None:
    """The scaling of one linear layer, if its config asks for the emulation."""
    recipe = getattr(config, EMULATED, None)
    if recipe == "delayed":
        return Delayed(group=_group(config))
    kinds: dict[str, type[Scaling]] = {"tensorwise": Current, "blockwise": Blocks}
    return None if recipe is None else kinds[recipe]()


def _group(config: Any) -> Any:
    """The ranks whose magnitudes Transformer Engine joins under Megatron. None if it is only this rank."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    group = parallel_state.get_amax_reduction_group(
        with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
    )
    return group if group.size() > 1 else None


def linear(x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    """x [..., D] W^T in x's dtype. All operands are rounded to FP8, in the forward and in the backward pass."""
    return _Linear.apply(x, weight, scaling)


class _Linear(torch.autograd.Function):
    """The operands of each product are rounded. The rounding itself has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        # `kept` is rounded for the weight's gradient, which sums over tokens.
        x_ND, kept_ND = scaling.cast(x.flatten(0, -2), "input", ctx.needs_input_grad[1])
        weight_OD, _ = scaling.cast(weight, "weight", False)
        ctx.save_for_backward(kept_ND if ctx.needs_input_grad[1] else None, weight_OD)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (x.dtype, weight.dtype), x.shape
        return (x_ND @ weight_OD.t()).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept_ND, weight_OD = ctx.saved_tensors
        d_NO, d_over_tokens_NO = ctx.scaling.cast(gradient.flatten(0, -2), "gradient", kept_ND is not None)
        d_x = (d_NO @ weight_OD).to(ctx.dtypes[0]).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_weight = (d_over_tokens_NO.t() @ kept_ND).to(ctx.dtypes[1]) if kept_ND is not None else None
        return d_x, d_weight, None
