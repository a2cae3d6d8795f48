"""A plan's student as a tensor source: slices of its teacher, two of them rescaled in a Gemma (`rescale.py`), or the
tensors of a compensation in their place, some of them scaled."""

from __future__ import annotations

import numpy as np

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.dtypes import as_stored
from nemo_minitron.pruning.rescale import factor, rescaled, times
from nemo_minitron.pruning.selection import origin_of, shapes_of, student_index
from nemo_minitron.sources.streams import Sink
from nemo_minitron.sources.tensors import TensorSource, whole

ROWS = 4096  # of a rescaled tensor, at a time


class Student:
    """The student of `plan` as a TensorSource, with its own canonical names and positions.

    `collective` is that of `source`. Raises InputError for a compensation of another plan.
    """

    def __init__(self, source: TensorSource, plan: PrunePlan, compensation: Compensation | None = None) -> None:
        self.source, self.plan, self.compensation = source, plan, compensation
        self.architecture = plan.target
        self.collective = getattr(source, "collective", False)
        if compensation is not None:
            compensation.check(plan)

    def origin(self, name: str) -> str:
        """The teacher's canonical name of the tensor that this one is cut from."""
        return origin_of(self.plan, name)

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores the teacher's tensor."""
        return self.source.dtype(self.origin(name))

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits of the outer product of sorted indices into the student's tensor."""
        if self._solved(name):
            return self._compensated(name, index)
        origin, kept = student_index(self.plan, name)
        raw = self.source.read(origin, tuple(k[i] for k, i in zip(kept, index, strict=True)))
        return rescaled(raw, self.dtype(name), self.plan, name, self._factor(name))

    def put(self, name: str, sink: Sink) -> None:
        """Writes the whole tensor into `sink`, in pieces if the source has a method `stream`, as HFSource has."""
        if self._solved(name):
            sink.write(self._compensated(name, whole(shapes_of(self.plan.target)[name])))
            return
        if self._factor(name) != 1.0:
            rows, *rest = whole(shapes_of(self.plan.target)[name])
            for first in range(0, len(rows), ROWS):
                sink.write(self.read(name, (rows[first : first + ROWS], *rest)))
            return
        origin, index = student_index(self.plan, name)
        if hasattr(self.source, "stream"):
            self.source.stream(origin, index, sink)
        else:
            sink.write(self.source.read(origin, index))

    def _solved(self, name: str) -> bool:
        return self.compensation is not None and name in self.compensation.tensors

    def _compensated(self, name: str, index: Index) -> np.ndarray:
        assert self.compensation is not None
        values = self.compensation.tensors[name][np.ix_(*index)]
        if (scale := self._scale(name)) != 1.0:
            values = times(values.astype(np.float64), scale, self.plan, name).astype(np.float32)
        return as_stored(values, self.dtype(name))

    def _factor(self, name: str) -> float:
        """What a slice is multiplied by."""
        return factor(self.plan, name) * self._scale(name)

    def _scale(self, name: str) -> float:
        """What the compensation multiplies the tensor by."""
        return 1.0 if self.compensation is None else self.compensation.scales.get(name, 1.0)
