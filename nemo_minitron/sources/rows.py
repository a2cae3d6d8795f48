"""Reads rows of a stored tensor with pread: many runs of rows in one call of the system."""

from __future__ import annotations

import math
import os
from typing import BinaryIO

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.sources.headers import SIZES, Entry
from nemo_minitron.sources.tensors import RAW

MOST = 1024  # the system's limit of buffers in one call
_GAP = memoryview(bytearray(64 << 10))


def check_range(kept: np.ndarray, size: int) -> None:
    """Raises IndexError if sorted indices leave a dimension of `size`."""
    if len(kept) and not 0 <= kept[0] <= kept[-1] < size:
        raise IndexError(f"{kept[0]} to {kept[-1]} of a dimension of {size}")


def read_rows(entry: Entry, rows: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """Sorted rows of a stored tensor, [len(rows), *row] as raw bits."""
    check_range(rows, entry.shape[0])
    block: np.ndarray = np.empty((len(rows), *row), np.uint8 if entry.dtype == "U8" else RAW[entry.dtype])
    if not len(rows):
        return block
    step = math.prod(row) * SIZES[entry.dtype]
    view = block.reshape(-1).view(np.uint8).data
    done, runs = 0, []
    for first, count in runs_of(rows):
        runs.append((entry.start + first * step, view[done : done + count * step]))
        done += count * step
    with open(entry.file, "rb", buffering=0) as stream:
        _fill(stream, runs)
    return block


def runs_of(rows: np.ndarray) -> list[tuple[int, int]]:
    """Sorted rows -> (first, count) of each run of neighbours."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return [(int(rows[0]), len(rows))]
    bounds = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    counts = np.diff(bounds, append=len(rows))
    return list(zip(rows[bounds].tolist(), counts.tolist(), strict=True))


def _fill(stream: BinaryIO, runs: list[tuple[int, memoryview]]) -> None:
    """Reads (position in the file, target) in order. Short gaps are read too, into `_GAP`, and ignored: one call that
    skips nothing takes less time than a call for each run."""
    views: list[memoryview] = []
    first = last = 0
    for position, view in runs:
        if views and (position - last > len(_GAP) or len(views) > MOST - 2):
            _read(stream, views, first)
            views = []
        if views:
            views.append(_GAP[: position - last])
        else:
            first = position
        views.append(view)
        last = position + len(view)
    if views:
        _read(stream, views, first)


def _read(stream: BinaryIO, views: list[memoryview], position: int) -> None:
    """Fills the views, one after another, with the bytes from `position` on."""
    wanted = sum(map(len, views))
    while wanted:
        count = os.preadv(stream.fileno(), views, position)
        if not count:
            raise InputError(f"'{stream.name}' is not a complete safetensors file: it ends at byte {position}")
        wanted, position = wanted - count, position + count
        if wanted:
            views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """The rest of the views after their first `count` bytes."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []
