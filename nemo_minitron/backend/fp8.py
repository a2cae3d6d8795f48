"""FP8 without Transformer Engine: its scaling and its rounding, in the linear layers of the reference twin.

What goes into a matrix product is rounded to the FP8 values that Transformer Engine would multiply; the product
itself is one of fp32, as the tensor cores sum in. Norms, attention, embeddings and the output head stay as they are.
It says what FP8 does to numbers, not how fast it is. The result may depend on the layout: per-tensor scales are those
of a rank's shard.
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
    """fp32, of amax's shape: what takes `amax` to the largest value of an FP8 dtype.

    `otherwise` where amax is 0 or not finite. `power_of_two`: rounded down to one, as of blocks.
    """
    most = torch.full_like(amax, torch.finfo(dtype).max, dtype=torch.float32)  # a number / a tensor rounds twice
    scale = (most / amax.float()).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        exponent = torch.frexp(scale).exponent - 1
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where((amax > 0) & amax.isfinite(), scale, otherwise)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in an FP8 dtype. What is too large becomes the largest value: the cast alone makes infinity of it."""
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x, in fp32, as its FP8 values stand for it."""
    return quantize(x, scale, dtype).float() * scale.reciprocal()


def rounded_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [R, C] in E4M3 with one scale, a power of two, for each block of rows x columns; ragged ones at the ends."""
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    found = rounded(blocks, scale_of(amax, E4M3, power_of_two=True), E4M3)
    return found.view(padded.shape)[:height, :width]


class Scaling(Protocol):
    """How the operands of a linear layer's products are rounded."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        """x [R, C] -> fp32 for a product that sums over C, and for one that sums over R (asked for if `summed`).

        `role`: input [tokens, in], weight [out, in] or gradient (of the output) [tokens, out].
        """


class Current:
    """One scale a tensor, of its own largest magnitude: fp8-current, Megatron's `tensorwise`."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        found = rounded(x, scale_of(_amax(x), HYBRID[role]), HYBRID[role])
        return found, found


class Blocks:
    """One scale for 128 values of an activation or a gradient, along what is summed over, or 128 x 128 of a weight."""

    def cast(self, x: Tensor, role: str, summed: bool) -> tuple[Tensor, Tensor]:
        if role == "weight":
            found = rounded_blocks(x, BLOCK, BLOCK)
            return found, found
        found = rounded_blocks(x, 1, BLOCK)
        return found, rounded_blocks(x, BLOCK, 1) if summed else found


class Delayed:
    """One scale a tensor, of the largest magnitude in the passes before this one: fp8-delayed.

    The state is one module's: the largest magnitudes of the last `length` passes, over all ranks of Megatron's amax
    reduction group. The first pass takes its own, where Transformer Engine starts at scale 1; and scales move in
    every pass, where Transformer Engine's move with gradients enabled alone, so that frozen models can be looked at.
    The state is not saved: a resumed run begins with a first pass again.
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
        found = rounded(x, self.scales[role], HYBRID[role])
        self._remember(amax, role)
        return found, found

    def _remember(self, amax: Tensor, role: str) -> None:
        history = self.history[role]
        history[self.passes[role] % self.length] = amax
        self.passes[role] += 1
        self.scales[role] = scale_of(history.max(), HYBRID[role], otherwise=self.scales[role])


def _amax(x: Tensor) -> Tensor:
    """[] fp32; 0 of no elements, as of an expert without tokens."""
    return x.detach().abs().max().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def scaling_for(config: Any) -> Scaling | None:
    """A linear layer's own, where its config asks for the emulation."""
    recipe = getattr(config, EMULATED, None)
    if recipe == "delayed":
        return Delayed(group=_group(config))
    kinds: dict[str, type[Scaling]] = {"tensorwise": Current, "blockwise": Blocks}
    return None if recipe is None else kinds[recipe]()


def _group(config: Any) -> Any:
    """The ranks whose magnitudes Transformer Engine joins under Megatron; None for one alone."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    group = parallel_state.get_amax_reduction_group(
        with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
    )
    return group if group.size() > 1 else None


def linear(x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    """x [..., in] W^T with all operands, forward and backward, in FP8; the result in x's dtype."""
    return _Linear.apply(x, weight, scaling)


class _Linear(torch.autograd.Function):
    """Rounding has no gradient of its own: each product's operands are rounded, and that is all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        flat = x.flatten(0, -2)
        values, kept = scaling.cast(flat, "input", ctx.needs_input_grad[1])
        matrix, _ = scaling.cast(weight, "weight", False)
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, matrix)
        ctx.scaling, ctx.dtypes, ctx.shape = scaling, (x.dtype, weight.dtype), x.shape
        return (values @ matrix.t()).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept, matrix = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        values, summed = ctx.scaling.cast(flat, "gradient", kept is not None)
        of_x = (values @ matrix).to(ctx.dtypes[0]).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_weight = (summed.t() @ kept).to(ctx.dtypes[1]) if kept is not None else None
        return of_x, of_weight, None
