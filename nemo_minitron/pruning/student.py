"""A plan's student as something to read: the slices of its teacher, or what a compensation has in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.digest import Index, bf16_bits
from nemo_minitron.pruning.headers import SIZES
from nemo_minitron.pruning.selection import shapes_of, student_index
from nemo_minitron.pruning.streams import Run
from nemo_minitron.pruning.tensors import TensorSource, whole


class Student:
    """The student of `plan` as a TensorSource, in its own canonical names and positions.

    `collective` is that of `source`. Raises InputError for a compensation of another plan.
    """

    def __init__(self, source: TensorSource, plan: PrunePlan, compensation: Compensation | None = None) -> None:
        self.source, self.plan, self.compensation = source, plan, compensation
        self.architecture = plan.target
        self.collective = getattr(source, "collective", False)
        if compensation is not None:
            compensation.check(plan)

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores the teacher's tensor."""
        return self.source.dtype(student_index(self.plan, name)[0])

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits of the outer product of sorted indices into the student's tensor."""
        if self._solved(name):
            return self._compensated(name, index)
        origin, kept = student_index(self.plan, name)
        return self.source.read(origin, tuple(k[i] for k, i in zip(kept, index, strict=True)))

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The whole tensor in blocks of rows, from the first to the last.

        Their size is the source's attribute `block`, in bytes of the teacher's rows: those are read whole before
        columns are picked. A source without it is asked for the tensor at once, as is a compensation.
        """
        if self._solved(name):
            yield self._compensated(name, whole(shapes_of(self.plan.target)[name]))
            return
        origin, (rows, *rest) = student_index(self.plan, name)
        width = math.prod(shapes_of(self.plan.source)[origin][1:]) * SIZES[self.source.dtype(origin)]
        step = max(1, getattr(self.source, "block", len(rows) * width) // width)
        for begin in range(0, len(rows), step):
            yield self.source.read(origin, (rows[begin : begin + step], *rest))

    def runs(self, name: str) -> tuple[Path, list[Run]] | None:
        """Where the whole tensor lies in a file of the source, if it is best copied from there without a look at it."""
        runs = getattr(self.source, "runs", None)
        return None if runs is None or self._solved(name) else runs(*student_index(self.plan, name))

    def _solved(self, name: str) -> bool:
        return self.compensation is not None and name in self.compensation.tensors

    def _compensated(self, name: str, index: Index) -> np.ndarray:
        assert self.compensation is not None
        return as_stored(self.compensation.tensors[name][np.ix_(*index)], self.dtype(name))


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers -> raw bits of a safetensors dtype, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        return bf16_bits(values.view(np.uint32), "F32")
    wide = values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    return wide.view(f"u{wide.itemsize}")


def as_numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of a safetensors dtype -> float64."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)
