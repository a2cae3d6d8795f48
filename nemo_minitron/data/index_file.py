"""Reads Megatron's `.idx`, which says where each document lies in the `.bin`, without Megatron; every number is
checked.

Little-endian: the nine bytes of MAGIC, uint64 version (1), uint8 code of the dtype, uint64 sequences, uint64 document
ends; then int32 [sequences] lengths, int64 [sequences] positions in bytes, int64 [document ends] documents. A file with
modalities ends in int8 [sequences].
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NoReturn

import numpy as np

from nemo_minitron.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
DTYPES = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
ARRAY = b"\x93NUMPY"  # the first bytes of a .npy
BLOCK = 1 << 20  # sequences that are checked at a time


def read_index(idx: Path, bin_size: int) -> tuple[np.ndarray, np.dtype]:
    """The ends of the sequences in tokens, int64 [sequences], and the dtype of the tokens; `bin_size`: bytes of the
    `.bin`.

    Raises InputError if the file is incomplete, or does not belong to the `.bin`.
    """
    dtype, sequences, documents, start = _header(idx)
    size, there = start + 12 * sequences + 8 * documents, idx.stat().st_size
    if there not in (size, size + sequences):
        _refuse(idx, f"it should have {size} bytes and has {there}")
    lengths = _numbers(idx, "<i4", start, sequences)
    positions = _numbers(idx, "<i8", start + 4 * sequences, sequences)
    borders = _numbers(idx, "<i8", start + 12 * sequences, documents)
    if (borders[1:] < borders[:-1]).any() or (len(borders) and (borders[0] < 0 or borders[-1] > sequences)):
        _refuse(idx, "its documents are not in order")
    if sequences and int(lengths.min()) < 0:
        _refuse(idx, f"it has a document of {int(lengths.min())} tokens")
    ends = np.cumsum(lengths, dtype=np.int64)
    for first in range(0, sequences, BLOCK):
        part = slice(first, first + BLOCK)
        if not np.array_equal(positions[part], (ends[part] - lengths[part]) * dtype.itemsize):
            _refuse(idx, "its documents do not lie end to end")
    if bin_size != (int(ends[-1]) if sequences else 0) * dtype.itemsize:
        raise InputError(f"'{idx.with_suffix('.bin')}' and '{idx}' do not belong together: build them again")
    return ends, dtype


def _header(idx: Path) -> tuple[np.dtype, int, int, int]:
    """The dtype of the tokens, the numbers of sequences and of document ends, and the byte where the arrays begin."""
    with open(idx, "rb") as file:
        head = file.read(len(MAGIC) + HEADER.size)
    if len(head) < len(MAGIC) + HEADER.size or not head.startswith(MAGIC):
        _refuse(idx, "it does not begin like one")
    version, code, sequences, documents = HEADER.unpack(head[len(MAGIC) :])
    if version != 1 or code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
        _refuse(idx, f"it is of version {version} with tokens of kind {code}; legal: version 1, kinds 1 to 5 and 8")
    return np.dtype(DTYPES[code]), sequences, documents, len(head)


def _numbers(idx: Path, dtype: str, start: int, count: int) -> np.ndarray:
    return np.memmap(idx, dtype=dtype, mode="r", offset=start, shape=(count,)) if count else np.empty(0, dtype)


def check_arrays(folder: Path) -> None:
    """Raises InputError if a `.npy` of Megatron's index of samples is not an array: numpy would load it as a pickle.

    numpy maps an array of numbers and refuses an array of objects. A file that another rank has just begun to write is
    accepted.
    """
    for file in folder.glob("*.npy"):
        with open(file, "rb") as stream:
            head = stream.read(len(ARRAY))
        if not ARRAY.startswith(head):
            raise InputError(f"'{file}' is not an array and is not loaded; delete '{folder}' and run the same again")


def _refuse(idx: Path, why: str) -> NoReturn:
    raise InputError(f"'{idx}' is not a complete index of Megatron's: {why}")
