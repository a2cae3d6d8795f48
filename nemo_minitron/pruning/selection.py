"""Which rows and columns of the teacher make a tensor of the student: the table of `axes.py`, applied."""

from __future__ import annotations

import functools

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.axes import owners, split_expert, split_name
from nemo_minitron.errors import InputError, nearest


def student_index(plan: PrunePlan, name: str) -> tuple[str, Index]:
    """Canonical tensor `name` of the student (layers 0..L'-1, experts 0..E'-1) -> the teacher's tensor and what
    stays of it.

    The index holds, per dimension, the sorted int64 positions in the teacher's global tensor; their outer
    product, read in order, is the student's global tensor (P1, section 2: pure selection).

    Raises InputError for a tensor that the student does not have and for a plan that does not give its shape.
    """
    source_name, origin, expert = _origin(plan, name)
    index = [np.arange(size, dtype=np.int64) for size in shapes_of(plan.source)[source_name]]
    for axis, row in owners(name):
        kept = plan.indices(axis.name, origin, expert)
        if kept is not None:
            index[row.dim] = _expand(kept, plan.source.head_dim if row.unit == "head_dim" else 1)
    kept_shape = tuple(map(len, index))
    shape = shapes_of(plan.target)[name]
    if kept_shape != shape:
        raise InputError(f"the plan keeps {kept_shape} of '{source_name}', but the student's '{name}' is {shape}")
    return source_name, tuple(index)


def origin_of(plan: PrunePlan, name: str) -> str:
    """The teacher's tensor that canonical tensor `name` of the student is cut from. Raises as `student_index` does."""
    return _origin(plan, name)[0]


def _origin(plan: PrunePlan, name: str) -> tuple[str, int | None, int | None]:
    """The teacher's tensor of a student's one, its layer, and its expert where it belongs to one."""
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


def _expand(units: list[int], size: int) -> np.ndarray:
    """Kept units -> the positions that they cover, `size` consecutive ones each."""
    return (np.asarray(units, np.int64)[:, None] * size + np.arange(size, dtype=np.int64)).reshape(-1)


@functools.lru_cache(maxsize=8)
def shapes_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """`architecture.shapes()`, made once: it is asked for each tensor. Not to be changed."""
    return architecture.shapes()
