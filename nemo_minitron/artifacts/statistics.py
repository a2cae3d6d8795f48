"""The paper's aggregations (2407.14679, section 2.2) as states that merge and finish.

An aggregation turns many numbers per channel into one. Its state is a tuple of arrays of one shape. The states of
two shards of a sequence, of two ranks' samples or of two runs merge exactly; finished values do not. The formulas
use only operators, so that they work on torch tensors (while a model runs) and on numpy arrays (in files).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nemo_minitron.errors import InputError, nearest

State = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """`merge(a, b)` -> state of the union; `finish(state)` -> one number per channel, 0 for an empty state.

    `fields` name the arrays of a state, as they are stored in Scores. A state of zeros is the empty one.
    """

    name: str
    fields: tuple[str, ...]
    merge: Callable[[State, State], State]
    finish: Callable[[State], Any]


def _add(a: State, b: State) -> State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _over(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    return a / (b + (b == 0))


def _merge_var(a: State, b: State) -> State:
    """Chan's formula: n, mean and M2 of the union."""
    n = a[0] + b[0]
    delta = b[1] - a[1]
    return n, a[1] + delta * _over(b[0], n), a[2] + b[2] + delta * delta * _over(a[0] * b[0], n)


def _merge_max(a: State, b: State) -> State:
    return (a[0] + (b[0] - a[0]) * (b[0] > a[0]),)


AGGREGATIONS = {
    aggregation.name: aggregation
    for aggregation in (
        Aggregation("mean", ("sum", "count"), _add, lambda s: _over(s[0], s[1])),
        Aggregation("l2", ("sum_of_squares",), _add, lambda s: s[0] ** 0.5),
        Aggregation("var", ("count", "mean", "m2"), _merge_var, lambda s: _over(s[2], s[0])),
        Aggregation("max", ("max",), _merge_max, lambda s: s[0]),
    )
}

TOKENS = "tokens"
"""Stands in place of an aggregation over samples: all positions of all samples count alike, and every criterion takes
their mean."""
ROUTED = "routed"
"""Stands in place of an aggregation over samples: the tokens that were routed to an expert have lost their sample, so
the criterion's aggregation over the sequence runs over all of them."""


def criterion(name: str) -> tuple[str, str]:
    """`"l2,mean"` -> (over samples, over the sequence), in the paper's order. Raises InputError for any other form."""
    parts = [part.strip() for part in name.split(",")]
    for part in parts:
        if part not in AGGREGATIONS:
            raise InputError(f"aggregation '{part}' in criterion '{name}' is unknown; {nearest(part, AGGREGATIONS)}")
    if len(parts) != 2:
        raise InputError(f"criterion '{name}' must be two aggregations 'batch,sequence', for example 'l2,mean'")
    return parts[0], parts[1]


def aggregation_of(pair: tuple[str, str]) -> Aggregation:
    """The aggregation whose states a statistic keeps for a pair: the one over samples, or else over positions."""
    over_samples, over_sequence = pair
    return AGGREGATIONS[over_sequence if over_samples in (TOKENS, ROUTED) else over_samples]
