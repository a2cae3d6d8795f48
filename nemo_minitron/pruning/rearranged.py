"""A model as another one, to check cuts: its units in another order, or with zeros in place of what a plan removes.

Both are read through the table of `axes.py`, as a cut is, and written by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.axes import WRITERS, Axis, owners, split_expert, split_name
from nemo_minitron.pruning.selection import expand, shapes_of
from nemo_minitron.sources.tensors import ModelSource


class Another(ModelSource):
    """A ModelSource with the sizes, the config and the dtypes of another one."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.architecture, self.config = source, source.architecture, source.config
        self.folder, self.path = source.folder, source.path

    def dtype(self, name: str) -> str:
        return self.source.dtype(name)


class Reordered(Another):
    """The same model with its units in another order, so it gives the same logits up to rounding.

    `order`: axis -> all of its units in their new order, [unit], {layer: [unit]} or {layer: {expert: [unit]}}, where
    experts are numbered as in the source. An axis that is absent stays as it is.
    """

    def __init__(self, source: ModelSource, order: Mapping[str, Any]) -> None:
        super().__init__(source)
        self.order = order

    def read(self, name: str, index: Index) -> np.ndarray:
        origin, layer, expert = self._origin(name)
        places = [np.arange(size) for size in shapes_of(self.architecture)[origin]]
        for cut, row in owners(name):
            if (units := self._units(cut, layer, expert)) is not None:
                moved = expand(units, row, cut.length(self.architecture), self.architecture)
                places[row.dim] = places[row.dim][moved]
        wanted = [place[positions] for place, positions in zip(places, index, strict=True)]
        ascending = tuple(np.sort(positions) for positions in wanted)  # a source reads sorted positions alone
        block = self.source.read(origin, ascending)
        return block[np.ix_(*map(np.searchsorted, ascending, wanted))]

    def _origin(self, name: str) -> tuple[str, int | None, int | None]:
        """(the source's tensor, its layer, its expert)"""
        layer, local = split_name(name)
        expert, pattern = split_expert(local)
        if layer is None or expert is None:
            return name, layer, None
        expert = self.order["experts"][layer][expert] if "experts" in self.order else expert
        return f"layers.{layer}.{pattern.format(e=expert)}", layer, expert

    def _units(self, cut: Axis, layer: int | None, expert: int | None) -> list[int] | None:
        units = self.order.get(cut.name)
        if units is None or not cut.per_layer:
            return units
        return units[layer][expert] if cut.per_expert else units[layer]


class Masked(Another):
    """The whole model, in which what a plan removes writes zeros: layers, neurons, heads, query groups, neurons of
    experts. On a family's `exact_axes` the plan's student gives the same logits, up to rounding."""

    def __init__(self, source: ModelSource, plan: PrunePlan) -> None:
        super().__init__(source)
        self.plan, self.layers = plan, set(plan.kept_layers)

    def read(self, name: str, index: Index) -> np.ndarray:
        block = self.source.read(name, index)
        layer, local = split_name(name)
        expert, pattern = split_expert(local)
        if layer is None or pattern not in WRITERS:
            return block
        if layer not in self.layers:
            return np.zeros_like(block)  # of every dtype, raw bits 0 are the number 0
        for cut, row in owners(name):
            kept = self.plan.indices(cut.name, layer, expert) if cut.per_layer and row.dim == 1 else None
            if kept is not None:
                stays = expand(kept, row, cut.length(self.architecture), self.architecture)
                block[:, ~np.isin(index[1], stays)] = 0
        return block
