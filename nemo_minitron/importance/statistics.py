"""The paper's aggregations (2407.14679, section 2.2) as states that add, merge and finish.

An aggregation turns many numbers per channel into one. Its state is a tuple of fp64 tensors of one shape, so
states of two shards of a sequence, or of two ranks' samples, merge exactly; finished values do not. The same
four serve over the sequence (one state per sample) and over the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.errors import InputError, nearest

State = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """`start(values)` reduces dimension 0 of [n, ...]; `merge(a, b)`; `finish(state)` -> [...].

    `fields` name the tensors of a state, as they are stored in Scores.
    """

    name: str
    fields: tuple[str, ...]
    start: Callable[[Tensor], State]
    merge: Callable[[State, State], State]
    finish: Callable[[State], Tensor]


def _count(values: Tensor) -> Tensor:
    return torch.full(values.shape[1:], values.shape[0], dtype=torch.float64, device=values.device)


def _add(a: State, b: State) -> State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _start_mean(values: Tensor) -> State:
    return values.abs().sum(0, dtype=torch.float32).double(), _count(values)


def _start_l2(values: Tensor) -> State:
    return (values.float().square().sum(0).double(),)


def _start_var(values: Tensor) -> State:
    exact = values.double()
    mean = exact.mean(0)
    return _count(values), mean, (exact - mean).square().sum(0)


def _merge_var(a: State, b: State) -> State:
    """Chan's formula: n, mean and M2 of the union."""
    n = a[0] + b[0]
    delta = b[1] - a[1]
    return n, a[1] + delta * b[0] / n, a[2] + b[2] + delta.square() * a[0] * b[0] / n


AGGREGATIONS = {
    aggregation.name: aggregation
    for aggregation in (
        Aggregation("mean", ("sum", "count"), _start_mean, _add, lambda s: s[0] / s[1]),
        Aggregation("l2", ("sum_of_squares",), _start_l2, _add, lambda s: s[0].sqrt()),
        Aggregation("var", ("count", "mean", "m2"), _start_var, _merge_var, lambda s: s[2] / s[0]),
        Aggregation(
            "max",
            ("max",),
            lambda v: (v.abs().amax(0).double(),),
            lambda a, b: (torch.maximum(a[0], b[0]),),
            lambda s: s[0],
        ),
    )
}


def check_norms(norms: str) -> None:
    """Raises InputError unless `norms` says which norms `hidden` sums."""
    if norms not in ("all", "layers"):
        raise InputError(f"norms '{norms}' is unknown; legal are all and layers")


def criterion(name: str) -> tuple[Aggregation, Aggregation]:
    """`"l2,mean"` -> (over samples, over the sequence), the paper's order. Raises InputError."""
    parts = name.split(",")
    for part in parts:
        if part not in AGGREGATIONS:
            raise InputError(f"aggregation '{part}' in criterion '{name}' is unknown; {nearest(part, AGGREGATIONS)}")
    if len(parts) != 2:
        raise InputError(f"criterion '{name}' must be two aggregations 'batch,sequence', for example 'l2,mean'")
    return AGGREGATIONS[parts[0]], AGGREGATIONS[parts[1]]
