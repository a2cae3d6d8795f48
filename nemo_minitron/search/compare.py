"""How close a plan's cuts are, and whether two plans differ only in units whose scores are nearly equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.axes import axis
from nemo_minitron.errors import InputError
from nemo_minitron.search.plans import scores_of

Where = tuple[str, int | None, int | None]  # axis, source layer, query group (of heads) or expert (of its neurons)


class Comparison(NamedTuple):
    """The number of units that one plan keeps and the other drops, inside and outside the band of the threshold."""

    identical: bool
    inside: int
    outside: int


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Units that are ranked against each other: their source indices, their scores (None: not scored), and those
    kept."""

    units: np.ndarray
    values: np.ndarray | None
    kept: frozenset[int]

    def band(self, tolerance: float) -> np.ndarray:
        """The units [n] within relative `tolerance` of the threshold.

        The threshold lies midway between the last kept score and the first dropped one, most important units first."""
        count = len(self.kept)
        if self.values is None or not 0 < count < len(self.units):
            return self.units[:0]
        values = self.values.astype(np.float64)
        ranked = np.sort(values)[::-1]
        threshold = (ranked[count - 1] + ranked[count]) / 2
        return self.units[np.abs(values - threshold) <= tolerance * abs(threshold)]


def threshold_band(scores: Scores, plan: PrunePlan, tolerance: float) -> dict[str, int]:
    """Axis that is cut -> number of units within relative `tolerance` of their threshold, over all kept layers.

    The threshold lies midway between the last kept unit and the first dropped one. If the scores of two runs differ
    by at most `e`, relative, then only units within 2 `e` of the threshold can change sides.
    """
    counts: dict[str, int] = {}
    for (name, _, _), cut in _cuts(scores, plan).items():
        counts[name] = counts.get(name, 0) + len(cut.band(tolerance))
    return counts


def compare_plans(a: PrunePlan, b: PrunePlan, scores: Scores, tolerance: float) -> Comparison:
    """Counts the units that only one of two plans keeps, inside and outside the band of the threshold of `scores`.

    Units are compared only in layers, and heads only in query groups, that both plans keep, since both then rank the
    same units. Raises InputError for plans of different sizes.
    """
    if (a.source, a.target) != (b.source, b.target):
        raise InputError("only plans of the same source and target sizes can be compared")
    cuts_a, cuts_b = _cuts(scores, a), _cuts(scores, b)
    inside = outside = 0
    for where in cuts_a.keys() & cuts_b.keys():
        differing = cuts_a[where].kept ^ cuts_b[where].kept
        close = len(differing & set(cuts_a[where].band(tolerance).tolist()))
        inside, outside = inside + close, outside + len(differing) - close
    return Comparison(inside + outside == 0, inside, outside)


def _cuts(scores: Scores, plan: PrunePlan) -> dict[Where, _Cut]:
    return {where: cut for name in plan.keep for where, cut in _cuts_of(name, scores, plan)}


def _cuts_of(name: str, scores: Scores, plan: PrunePlan) -> Iterator[tuple[Where, _Cut]]:
    for layer in plan.keep[name] if isinstance(plan.keep[name], dict) else [None]:
        if axis(name).per_expert and layer is not None:
            yield from _expert_cuts(name, layer, scores, plan)
            continue
        kept = plan.indices(name, layer) or []
        values = _scores_or_none(scores, name, layer)
        if name == "heads":
            yield from _group_cuts(layer, kept, values, plan)
        else:
            units = np.arange(len(values)) if values is not None else np.asarray(kept)
            yield (name, layer, None), _Cut(units, values, frozenset(kept))


def _expert_cuts(name: str, layer: int, scores: Scores, plan: PrunePlan) -> Iterator[tuple[Where, _Cut]]:
    values = _scores_or_none(scores, name, layer)
    for expert, kept in plan.keep[name][layer].items():
        units = np.asarray(kept) if values is None else np.arange(values.shape[-1])
        yield (name, layer, expert), _Cut(units, None if values is None else values[expert], frozenset(kept))


def _group_cuts(
    layer: int | None, kept: list[int], values: np.ndarray | None, plan: PrunePlan
) -> Iterator[tuple[Where, _Cut]]:
    size = plan.source.heads_per_group
    for group in sorted({head // size for head in kept}):
        units = np.arange(group * size, (group + 1) * size)
        of_group = None if values is None else values[units]
        yield ("heads", layer, group), _Cut(units, of_group, frozenset(kept) & frozenset(units.tolist()))


def _scores_or_none(scores: Scores, name: str, layer: int | None) -> np.ndarray | None:
    scored = name in scores or (name == "query_groups" and "heads" in scores)
    return scores_of(scores, name, layer) if scored else None
