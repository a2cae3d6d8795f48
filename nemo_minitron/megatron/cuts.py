"""A plan's Compensation while the ranks make it: one file a matrix, joined by rank 0 in the end.

Shapes (docs/shapes.md): D input channels of a matrix, H hidden channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.blocks import Gap
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.pruning.compensation import solvable, solve
from nemo_minitron.pruning.defaults import AUTO
from nemo_minitron.pruning.gaps import filling, gaps, last_matrix, scales_behind
from nemo_minitron.pruning.ridge import chosen_ridge
from nemo_minitron.pruning.selection import student_index
from nemo_minitron.sources.tensors import ModelSource


class Cut:
    """A plan and the matrices that are re-fitted for it: files in `parts`, then one Compensation in `out`.

    `wanted`: the teacher's tensor whose inputs are cut -> the student's tensor that is re-fitted. `gaps`: the dropped
    layers that are filled, each with the student's matrix in front of it that learns to; None if there is none.
    """

    def __init__(self, plan: PrunePlan, out: Path, fill_gaps: bool = False) -> None:
        self.plan, self.out = plan, out
        self.wanted = {origin: name for name, origin in solvable(plan)}
        self.gaps = {gap: self._matrix(gap) for gap in gaps(plan)} if fill_gaps else {}
        self.filled = {name for name in self.gaps.values() if name}
        self.parts = out.with_name(f"{out.name}.parts")

    def _matrix(self, gap: Gap) -> str | None:
        local = last_matrix(self.plan.source, gap)
        return None if local is None else f"layers.{self.plan.kept_layers.index(gap.first - 1)}.{local}"

    def begin(self) -> None:
        """Makes the folder of parts, empty. Rank 0 calls it."""
        shutil.rmtree(self.parts, ignore_errors=True)  # a run that was killed may have left files
        self.parts.mkdir(parents=True)

    def solve(self, source: ModelSource, origin: str, gram: np.ndarray, ridge: float | str) -> None:
        """Re-fits the matrix that reads `origin`'s inputs, if this plan cuts them. `gram`: float64 [D, D], or [2, D, D]
        of the halves of the samples, on which the ridge is chosen."""
        if origin in self.wanted:
            name = self.wanted[origin]
            if isinstance(ridge, str):
                ridge, gram = chosen_ridge(source, self.plan, name, gram), gram.sum(0)
                (self.parts / f"{name}.ridge").write_text(str(ridge))
            np.save(self.parts / name, solve(source, self.plan, name, gram, ridge))

    def fill(self, gap: Gap, sums: np.ndarray, growth: float) -> None:
        """Leaves the change of the matrix in front of a gap, if this plan has the gap. `sums`: float64 [D, D + 2H]."""
        if name := self.gaps.get(gap):
            np.save(self.parts / f"{name}.change", filling(self.plan, name, sums, growth))

    def finish(self, source: ModelSource, notes: JsonObject, growth: Mapping[Gap, float]) -> None:
        """Joins the parts to the Compensation. Rank 0 calls it. `growth`: the logarithm of each gap's factor."""
        tensors = {name: np.load(self.parts / f"{name}.npy", mmap_mode="r") for name in self.wanted.values()}
        for name in self.filled:
            change = np.load(self.parts / f"{name}.change.npy")
            start = tensors[name] if name in tensors else self._slice(source, name)
            tensors[name] = (start + change).astype(np.float32)
        if notes["ridge"] == AUTO:
            ridges = {name: float((self.parts / f"{name}.ridge").read_text()) for name in self.wanted.values()}
            notes = {**notes, "ridge of each matrix": {name: float(f"{r:.3g}") for name, r in ridges.items()}}
        scales = scales_behind(self.plan, {gap: growth[gap] for gap in self.gaps})
        if self.gaps:
            notes = {**notes, "filled gaps": sorted(self.filled)}
            notes["scaled behind dropped layers"] = {name.split(".")[1]: scale for name, scale in scales.items()}
        Compensation(self.plan.digest, tensors, notes, scales).save(self.out)
        shutil.rmtree(self.parts)

    def _slice(self, source: ModelSource, name: str) -> np.ndarray:
        origin, index = student_index(self.plan, name)
        return as_numbers(source.read(origin, index), source.dtype(origin))
