"""Guesses the loss of a shape from measured losses of cuts along one axis each.

The rise of the loss above the uncut model's is measured at a few sizes of each axis. Between them it is interpolated by
a monotone cubic (PCHIP), since the loss rises ever faster as an axis gets smaller: on SmolLM2, with four sizes an axis,
lines order shapes by 0.84 to 0.93 (Spearman, by where the sizes lie) and PCHIP by 0.87 to 0.90, with three by 0.77 to
0.82 and 0.84 to 0.89. The rises of a shape's sizes are added. It is a heuristic, as the share of scores that a shape
keeps (`proxy.py`) is, but it has seen what each axis costs this model, and where the loss of a cut runs away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nemo_minitron.search.formula import Columns
from nemo_minitron.search.space import Space
from nemo_minitron.search.varied import length


@dataclasses.dataclass(frozen=True)
class Marginals:
    """`uncut`: the loss of the uncut model, in nats a token; `losses[axis][size]`: of the model with this one axis
    cut; `groups`: the query groups of the uncut model."""

    uncut: float
    losses: Mapping[str, Mapping[int, float]]
    lengths: Mapping[str, int]  # axis -> its size in the uncut model
    groups: int

    def __call__(self, sizes: Columns) -> np.ndarray:
        """exp(-rise), float64 [shapes]: the uncut model's perplexity as a share of the perplexity that is guessed. NaN
        for a size below the smallest that was measured."""
        rise = np.zeros(len(next(iter(sizes.values()))))
        for name, measured in self.losses.items():
            rise += self._rise(name, measured, _alone(sizes, name, self.groups))
        return np.exp(-rise)

    def _rise(self, name: str, measured: Mapping[int, float], at: np.ndarray) -> np.ndarray:
        from scipy.interpolate import PchipInterpolator

        points = {**measured, self.lengths[name]: self.uncut}
        known = sorted(points)
        rise = PchipInterpolator(known, [points[size] - self.uncut for size in known], extrapolate=False)
        return rise(at)


def _alone(sizes: Columns, name: str, groups: int) -> np.ndarray:
    """The size of an axis in each shape if no other axis is cut: for heads, as many in each of all query groups."""
    if name != "heads":
        return sizes[name]
    return sizes[name] // sizes.get("query_groups", np.array(groups)) * groups


def points_of(space: Space, name: str, count: int) -> Sequence[int]:
    """The sizes of an axis at which the loss is measured, rising: `count` of the space's sizes below the uncut one, at
    most, evenly spread, with the smallest and the largest of them. It is empty if the axis does not vary."""
    sizes: set[int] = set()
    for columns in space.blocks():
        sizes.update(np.unique(_alone(columns, name, space.source.num_query_groups)).tolist())
    if len(sizes) < 2:
        return []
    below = sorted(size for size in sizes if size < length(space.source, name))
    places = np.linspace(0, len(below) - 1, min(count, len(below))).round().astype(int)
    return [below[place] for place in places]
