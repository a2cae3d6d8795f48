"""Finds NaN and infinity in raw bits: their exponent is all ones.

Read as signed integers, the positive ones among them are the largest values; read as unsigned integers, the negative
ones are. So two searches for a maximum find them, in a fraction of a copy's time while the bits lie in the processor's
cache.
"""

from __future__ import annotations

import numpy as np

from nemo_minitron.errors import InputError

EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # safetensors dtype -> +inf
PIECE = 128 << 10  # bytes that are searched at a time, twice


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite; `raw`: bits of a safetensors dtype, as in `tensors.RAW`, in any shape."""
    flat, infinity = np.ascontiguousarray(raw).reshape(-1), EXPONENTS[dtype]
    negative, step = infinity | 1 << (8 * raw.itemsize - 1), PIECE // raw.itemsize
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        if part.view(f"i{raw.itemsize}").max() >= infinity or part.max() >= negative:
            return False
    return True


def check_finite(raw: np.ndarray, dtype: str, name: str) -> None:
    """Raises InputError, which names the tensor, if a number is not finite."""
    if not all_finite(raw, dtype):
        raise InputError(
            f"the weights '{name}' hold a number that is not finite (NaN or an infinity), so they cannot be used: "
            "take an earlier checkpoint, or mend the model that they come from"
        )
