"""Activations -> states of the paper's aggregations (2407.14679, section 2.2). `artifacts.statistics` has the formulas.

A reduction over the sequence reads every activation of the model. So it is one pass in the activation's own precision,
with fp32 sums. Everything after it is small and in fp64.

Shapes (docs/shapes.md): S positions of the sequence, B sequences, N tokens, J samples, L rows of a score, Z the two
halves of the samples, X further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.artifacts.statistics import AGGREGATIONS, State, criterion

__all__ = ["AGGREGATIONS", "criterion", "over_samples", "over_sequence", "with_counts"]

Sums = tuple[Tensor, ...]  # a state without its count


def over_sequence(name: str, values_SBX: Tensor, ids_SB: Tensor | None, samples: int) -> Sums:
    """Reduces activations to [J, ...]: a state without its count (see `with_counts`).

    `ids_SB` int64: the sample of each position, -1 if it does not count. None: column b is sample b. If the values have
    k times as many positions (heads in the place of channels), each id stands for k of them.
    """
    if ids_SB is None:
        return _EVERY_POSITION[name](values_SBX)
    if len(values_SBX) != len(ids_SB):
        ids_SB = ids_SB.repeat_interleave(values_SBX.shape[0] // ids_SB.shape[0], 0)
    counts_SB = ids_SB >= 0
    return _BY_ID[name](values_SBX[counts_SB].double(), ids_SB[counts_SB], samples)


def _mean_of_all(values_SBX: Tensor) -> Sums:
    return (values_SBX.abs().sum(0, dtype=torch.float32),)


def _l2_of_all(values_SBX: Tensor) -> Sums:
    return (values_SBX.float().square().sum(0),)


def _var_of_all(values_SBX: Tensor) -> Sums:
    """Around a mean that is rounded to fp32, then corrected for the rounding: exact far from zero, too."""
    values_SBX = values_SBX.float()
    rounded_BX = values_SBX.mean(0)
    rest_SBX = values_SBX - rounded_BX
    correction_BX = rest_SBX.sum(0).double() / len(values_SBX)
    squares_BX = rest_SBX.square().sum(0).double() - correction_BX.square() * len(values_SBX)
    return rounded_BX.double() + correction_BX, squares_BX


def _max_of_all(values_SBX: Tensor) -> Sums:
    return (values_SBX.abs().amax(0).float(),)


def _sums(values_NX: Tensor, ids_N: Tensor, samples: int) -> Tensor:
    """[J, ...], by a product of matrices. Adding many positions into few samples one by one is slow on a GPU, and the
    order of its sums is random."""
    one_hot_NJ = torch.nn.functional.one_hot(ids_N, samples).to(values_NX.dtype)
    flat = values_NX.view(len(values_NX), values_NX.shape[1:].numel())
    return (one_hot_NJ.t() @ flat).view(samples, *values_NX.shape[1:])


def _var_by_id(values_NX: Tensor, ids_N: Tensor, samples: int) -> Sums:
    counts_J = torch.bincount(ids_N, minlength=samples).clamp(min=1).double()
    mean_JX = _sums(values_NX, ids_N, samples) / counts_J.view(-1, *[1] * (values_NX.dim() - 1))
    return mean_JX, _sums((values_NX - mean_JX[ids_N]).square(), ids_N, samples)


def _max_by_id(values_NX: Tensor, ids_N: Tensor, samples: int) -> Sums:
    zeros_JX = values_NX.new_zeros(samples, *values_NX.shape[1:])
    return (zeros_JX.index_reduce_(0, ids_N, values_NX.abs(), "amax"),)


_EVERY_POSITION: dict[str, Callable[[Tensor], Sums]] = {
    "mean": _mean_of_all, "l2": _l2_of_all, "var": _var_of_all, "max": _max_of_all,
}  # fmt: skip
_BY_ID: dict[str, Callable[[Tensor, Tensor, int], Sums]] = {
    "mean": lambda values_NX, ids_N, samples: (_sums(values_NX.abs(), ids_N, samples),),
    "l2": lambda values_NX, ids_N, samples: (_sums(values_NX.square(), ids_N, samples),),
    "var": _var_by_id,
    "max": _max_by_id,
}


def with_counts(name: str, sums: Sums, counts_J: Tensor) -> State:
    """Sums fp64 [L, J, ...] -> the complete state. `counts_J` fp64: the number of positions of each sample."""
    if "count" not in AGGREGATIONS[name].fields:
        return sums
    count_LJX = counts_J.view(1, -1, *[1] * (sums[0].dim() - 2)).expand_as(sums[0])
    return (count_LJX, *sums) if name == "var" else (*sums, count_LJX)


def over_samples(name: str, values_LJX: Tensor, deal_JZ: Tensor) -> State:
    """Finished samples, fp64 -> the state over samples [L, Z, ...], in two halves.

    `deal_JZ` fp64 is 1 where a sample belongs to a half. A sample that does not count has zeros.
    """
    counts = deal_JZ.sum(0).view(1, 2, *[1] * (values_LJX.dim() - 2))
    if name == "mean":
        total_LZX = dealt(values_LJX.abs(), deal_JZ)
        return total_LZX, counts.expand_as(total_LZX).contiguous()
    if name == "l2":
        return (dealt(values_LJX.square(), deal_JZ),)
    masks = [deal_JZ[:, half].view(1, -1, *[1] * (values_LJX.dim() - 2)) for half in (0, 1)]
    if name == "max":
        return (torch.stack([(values_LJX.abs() * mask).amax(1) for mask in masks], 1),)
    mean_LZX = dealt(values_LJX, deal_JZ) / counts.clamp(min=1)
    squares = [((values_LJX - mean_LZX[:, half : half + 1]).square() * mask).sum(1) for half, mask in enumerate(masks)]
    return counts.expand_as(mean_LZX).contiguous(), mean_LZX, torch.stack(squares, 1)


def dealt(values_LJX: Tensor, deal_JZ: Tensor) -> Tensor:
    """[L, Z, ...]: sums over the samples of each half."""
    return torch.einsum("lj...,jz->lz...", values_LJX, deal_JZ)
