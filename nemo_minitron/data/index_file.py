"""Megatron's `.idx`, read as data: where each document lies in the `.bin`. No Megatron, and nothing believed.

Little-endian: the nine bytes of MAGIC, uint64 version (1), uint8 code of the dtype, uint64 sequences, uint64 document
ends; then int32 [sequences] lengths, int64 [sequences] positions in bytes, int64 [document ends] documents. Files with
modalities have int8 [sequences] behind that.
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
ARRAY = b"\x93NUMPY"  # how a .npy begins
BLOCK = 1 << 20  # sequences looked at together


def read_index(idx: Path, bin_size: int) -> tuple[np.ndarray, np.dtype]:
    """Ends of the sequences in tokens, int64 [sequences], and the dtype of the tokens in a `.bin` of so many bytes.

    Raises InputError for a file that is not whole, or does not belong to it.
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
        raise InputError(f"'{idx.with_suffix('.bin')}' and '{idx}' do not belong together: build them anew")
    return ends, dtype


def _header(idx: Path) -> tuple[np.dtype, int, int, int]:
    """The tokens' dtype, how many sequences and document ends there are, and where they begin."""
    with open(idx, "rb") as file:
        head = file.read(len(MAGIC) + HEADER.size)
    if len(head) < len(MAGIC) + HEADER.size or not head.startswith(MAGIC):
        _refuse(idx, "it does not begin as one")
    version, code, sequences, documents = HEADER.unpack(head[len(MAGIC) :])
    if version != 1 or code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
        _refuse(idx, f"it is of version {version} with tokens of kind {code}; legal: version 1, kinds 1 to 5 and 8")
    return np.dtype(DTYPES[code]), sequences, documents, len(head)


def _numbers(idx: Path, dtype: str, start: int, count: int) -> np.ndarray:
    return np.memmap(idx, dtype=dtype, mode="r", offset=start, shape=(count,)) if count else np.empty(0, dtype)


def check_arrays(folder: Path) -> None:
    """Raises InputError where a `.npy` of Megatron's index of samples is none: numpy would take it for a pickle.

    Of an array numpy maps the numbers, and refuses objects. A file that another rank has just begun is let be.
    """
    for file in folder.glob("*.npy"):
        with open(file, "rb") as stream:
            head = stream.read(len(ARRAY))
        if not ARRAY.startswith(head):
            raise InputError(f"'{file}' is no array, and is not loaded; delete '{folder}' and run the same again")


def _refuse(idx: Path, why: str) -> NoReturn:
    raise InputError(f"'{idx}' is no whole index of Megatron's: {why}")
