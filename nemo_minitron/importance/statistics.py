"""Activations -> states of the paper's aggregations (2407.14679, section 2.2); the formulas are the artifacts'.

Over the sequence a reduction runs through every activation of the model, so it is one pass in the activation's
own precision with fp32 sums; everything after it is small and in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.artifacts.statistics import AGGREGATIONS, State, criterion

__all__ = ["AGGREGATIONS", "criterion", "over_samples", "over_sequence", "with_counts"]

Heavy = tuple[Tensor, ...]


def over_sequence(name: str, values: Tensor, ids: Tensor | None, samples: int) -> Heavy:
    """Reduces activations [P, B, ...] to [samples, ...]: a state but for its count (see `with_counts`).

    `ids` int64 [P, B] says whose position each one is, -1 for nobody's; None: column b is sample b. Where
    values has k times as many positions as `ids` (heads in the place of channels), each stands k times.
    """
    if ids is None:
        return _WHOLE[name](values)
    ids = ids.repeat_interleave(values.shape[0] // ids.shape[0], 0) if len(values) != len(ids) else ids
    kept = ids >= 0
    return _SPLIT[name](values[kept].double(), ids[kept], samples)


def _mean_whole(values: Tensor) -> Heavy:
    return (values.abs().sum(0, dtype=torch.float32),)


def _l2_whole(values: Tensor) -> Heavy:
    return (values.float().square().sum(0),)


def _var_whole(values: Tensor) -> Heavy:
    """Around a mean rounded to fp32, and corrected for what the rounding left: exact far from zero too."""
    values = values.float()
    around = values.mean(0)
    rest = values - around
    left = rest.sum(0).double() / len(values)
    return around.double() + left, rest.square().sum(0).double() - left.square() * len(values)


def _max_whole(values: Tensor) -> Heavy:
    return (values.abs().amax(0).float(),)


def _sums(values: Tensor, ids: Tensor, samples: int) -> Tensor:
    """By a product of matrices: adding many positions into few samples one by one is slow on a GPU, in random order."""
    places = torch.nn.functional.one_hot(ids, samples).to(values.dtype)
    return (places.t() @ values.view(len(values), values.shape[1:].numel())).view(samples, *values.shape[1:])


def _var_split(values: Tensor, ids: Tensor, samples: int) -> Heavy:
    counts = torch.bincount(ids, minlength=samples).clamp(min=1).double()
    mean = _sums(values, ids, samples) / counts.view(-1, *[1] * (values.dim() - 1))
    return mean, _sums((values - mean[ids]).square(), ids, samples)


def _max_split(values: Tensor, ids: Tensor, samples: int) -> Heavy:
    return (values.new_zeros(samples, *values.shape[1:]).index_reduce_(0, ids, values.abs(), "amax"),)


_WHOLE: dict[str, Callable[[Tensor], Heavy]] = {
    "mean": _mean_whole, "l2": _l2_whole, "var": _var_whole, "max": _max_whole,
}  # fmt: skip
_SPLIT: dict[str, Callable[[Tensor, Tensor, int], Heavy]] = {
    "mean": lambda v, ids, n: (_sums(v.abs(), ids, n),),
    "l2": lambda v, ids, n: (_sums(v.square(), ids, n),),
    "var": _var_split,
    "max": _max_split,
}


def with_counts(name: str, heavy: Heavy, counts: Tensor) -> State:
    """The state of `heavy` fp64 [R, samples, ...]; `counts` fp64 [samples]: positions of each sample."""
    if "count" not in AGGREGATIONS[name].fields:
        return heavy
    count = counts.view(1, -1, *[1] * (heavy[0].dim() - 2)).expand_as(heavy[0])
    return (count, *heavy) if name == "var" else (*heavy, count)


def over_samples(name: str, values: Tensor, deal: Tensor) -> State:
    """States of finished samples fp64 [R, samples, ...] -> [R, 2, ...], in two halves.

    `deal` fp64 [samples, 2] has a 1 where a sample belongs to a half, and zeros for one that does not count.
    """
    counts = deal.sum(0).view(1, 2, *[1] * (values.dim() - 2))
    if name == "mean":
        total = dealt(values.abs(), deal)
        return total, counts.expand_as(total).contiguous()
    if name == "l2":
        return (dealt(values.square(), deal),)
    if name == "max":
        return (torch.stack([(values.abs() * _column(deal, k, values)).amax(1) for k in (0, 1)], 1),)
    mean = dealt(values, deal) / counts.clamp(min=1)
    parts = [((values - mean[:, k : k + 1]).square() * _column(deal, k, values)).sum(1) for k in (0, 1)]
    return counts.expand_as(mean).contiguous(), mean, torch.stack(parts, 1)


def dealt(values: Tensor, deal: Tensor) -> Tensor:
    """[R, samples, ...] -> [R, 2, ...]: sums over the samples of each half."""
    return torch.einsum("rn...,nh->rh...", values, deal)


def _column(deal: Tensor, half: int, values: Tensor) -> Tensor:
    return deal[:, half].view(1, -1, *[1] * (values.dim() - 2))
