"""The exact cost of many shapes at once, interpolated from Architecture's own formula at a few sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nemo_minitron import windows
from nemo_minitron.architecture import Architecture
from nemo_minitron.search.varied import length, resized

Cost = Callable[[Architecture], int]
Columns = Mapping[str, np.ndarray]  # axis -> its size in each shape, int64 [shapes]


class Formula:
    """`cost` of `source` with other sizes along `axes`, for arrays of sizes.

    Kinds of a hybrid's layers may be among `axes`. If layers vary and only some have a window, every layer is counted
    without one, as in `Architecture.replace`.

    Parameters, bytes to serve and FLOPs are sums of products in which no size occurs twice. Such a sum is determined
    by its values at two sizes of each axis, so `cost` is evaluated there and no formula is written twice. If query
    groups vary, heads must be among the axes.

    Raises ValueError if `cost` is not such a sum (its value for the source is then wrong).
    """

    def __init__(self, cost: Cost, source: Architecture, axes: Sequence[str]) -> None:
        if "layers" in axes and source.window_attn_skip_freq:
            source = source.replace(**dict.fromkeys(windows.FIELDS))
        pairs = {name: _two_sizes(name, source, axes) for name in axes}
        values = np.empty((2,) * len(axes), dtype=object)  # Python's integers: nothing is rounded
        for corner in itertools.product((0, 1), repeat=len(axes)):
            sizes = {name: pairs[name][at] for name, at in zip(axes, corner, strict=True)}
            values[corner] = cost(resized(source, sizes))
        for i, name in enumerate(axes):
            values = _coefficients(np.moveaxis(values, i, 0), *pairs[name], i)
        self.terms = {
            tuple(name for name, at in zip(axes, corner, strict=True) if at): int(values[corner])
            for corner in itertools.product((0, 1), repeat=len(axes))
            if values[corner]
        }
        source_sizes = {name: np.array([length(source, name)]) for name in axes}
        if self(source_sizes)[0] != cost(source):
            raise ValueError("the cost is no sum of products of sizes in which each size occurs once")

    def __call__(self, sizes: Columns) -> np.ndarray:
        """The cost of each shape, int64 [shapes]."""
        count = len(next(iter(sizes.values()))) if sizes else 1
        total = np.full(count, self.terms.get((), 0), np.int64)
        for names, coefficient in self.terms.items():
            if names:
                total += coefficient * math.prod(sizes[name] for name in names)
        return total


def _coefficients(values: np.ndarray, low: int, high: int, position: int) -> np.ndarray:
    """Values at two sizes of the first dimension -> its constant and factor; the dimension moves back to `position`."""
    factor = (values[1] - values[0]) // (high - low)
    return np.moveaxis(np.stack([values[0] - factor * low, factor]), 0, position)


def _two_sizes(name: str, source: Architecture, axes: Sequence[str]) -> tuple[int, int]:
    """Two small sizes of an axis, legal with any size of the others; small, because each layer takes time to count."""
    if name == "heads":  # a multiple of the query groups; if those vary too, of two groups
        groups = 2 if "query_groups" in axes else source.num_query_groups
        return groups, 2 * groups
    groups_of = {"experts": source.moe_router_num_groups, "mamba_heads": source.mamba_num_groups}
    step = groups_of.get(name) or 1
    least = max(source.moe_router_topk, 2 if "experts_per_token" in axes else 1) if name == "experts" else 1
    least = -(-least // step) * step
    return least, least + step
