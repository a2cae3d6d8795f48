"""The dtypes of safetensors in numpy. Raw bits are unsigned integers of the stored dtype's size (BF16 -> uint16).

A NaN is converted without a warning: `sources/finite.py` refuses it, and names the tensor that holds it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

NUMPY: dict[str, type[np.generic]] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


def as_numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of a safetensors dtype -> float64, exactly."""
    with np.errstate(invalid="ignore"):
        return raw.view(NUMPY[dtype]).astype(np.float64)


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers -> raw bits of a safetensors dtype, rounded to nearest, ties to even."""
    with np.errstate(invalid="ignore"):
        stored: np.ndarray = np.ascontiguousarray(values, np.float32).astype(NUMPY[dtype])
    return stored.view(f"u{stored.itemsize}")


def bf16_bits(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw bits of a safetensors dtype -> bfloat16 bits, uint16; F64 is rounded to fp32 first."""
    return raw.view(np.uint16) if dtype == "BF16" else as_stored(raw.view(NUMPY[dtype]), "BF16")
