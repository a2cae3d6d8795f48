"""The rows and columns of the teacher that make a tensor of the student, by the table of `axes.py`."""

from __future__ import annotations

import functools

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.axes import Row, owners, split_expert, split_name
from nemo_minitron.errors import InputError, nearest


def student_index(plan: PrunePlan, name: str) -> tuple[str, Index]:
    """Canonical tensor `name` of the student -> (the teacher's tensor, the index of what stays of it).

    Layers and experts in `name` are numbered as in the student. The index has, for each dimension, the sorted int64
    positions in the teacher's global tensor. Their outer product, read in order, is the student's global tensor
    (2407.14679, section 2: pure selection).

    Raises InputError for a tensor that the student does not have and for a plan that does not give its shape.
    """
    source_name, origin, expert = _origin(plan, name)
    index = [np.arange(size, dtype=np.int64) for size in shapes_of(plan.source)[source_name]]
    owned: set[int] = set()
    for axis, row in owners(name):
        kept = plan.indices(axis.name, origin, expert)
        if kept is not None:
            positions = expand(kept, row, axis.length(plan.source), plan.source)
            if row.dim in owned:  # by two axes: what both keep
                positions = np.intersect1d(index[row.dim], positions, assume_unique=True)
            index[row.dim] = positions
            owned.add(row.dim)
    kept_shape = tuple(map(len, index))
    shape = shapes_of(plan.target)[name]
    if kept_shape != shape:
        raise InputError(f"the plan keeps {kept_shape} of '{source_name}', but the student's '{name}' is {shape}")
    return source_name, tuple(index)


def origin_of(plan: PrunePlan, name: str) -> str:
    """The teacher's tensor that canonical tensor `name` of the student is cut from. Raises as `student_index` does."""
    return _origin(plan, name)[0]


def _origin(plan: PrunePlan, name: str) -> tuple[str, int | None, int | None]:
    """(The teacher's tensor that this one is cut from, its layer, its expert); None for what it does not have."""
    shapes = shapes_of(plan.target)
    if name not in shapes:
        raise InputError(f"the student has no tensor '{name}'; {nearest(name, shapes)}")
    layer, local = split_name(name)
    if layer is None:
        return name, None, None
    origin = plan.kept_layers[layer]
    expert, pattern = split_expert(local)
    if expert is not None:
        kept = plan.indices("experts", origin)
        expert = expert if kept is None else kept[expert]
    return f"layers.{origin}.{pattern.format(e=expert)}", origin, expert


def expand(units: list[int], row: Row, length: int, source: Architecture) -> np.ndarray:
    """Kept units of an axis of `length` -> their positions: consecutive ones of each, and those in each repetition."""
    unit, each = row.sizes(source)
    positions = (np.asarray(units, np.int64)[:, None] * unit + np.arange(unit, dtype=np.int64)).reshape(-1)
    return (np.arange(each, dtype=np.int64)[:, None] * (length * unit) + positions).reshape(-1)


@functools.lru_cache(maxsize=8)
def shapes_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """`architecture.shapes()`, made once, because every tensor needs it. Do not change it."""
    return architecture.shapes()
