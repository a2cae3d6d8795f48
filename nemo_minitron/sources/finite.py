"""Whether numbers are numbers, in raw bits: an exponent of all ones is NaN or an infinity.

As whole numbers with a sign the positive ones of those are the largest there are, without one the negative ones: two
searches for a maximum, which take a fraction of a copy's time while the bits lie in the processor's cache.
"""

from __future__ import annotations

import numpy as np

from nemo_minitron.errors import InputError

EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # safetensors dtype -> +inf
PIECE = 128 << 10  # elements' bytes that are searched at a time, twice


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Of raw bits of a safetensors dtype, as `tensors.RAW` has them, in any shape."""
    flat, infinity = np.ascontiguousarray(raw).reshape(-1), EXPONENTS[dtype]
    negative, step = infinity | 1 << (8 * raw.itemsize - 1), PIECE // raw.itemsize
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        if part.view(f"i{raw.itemsize}").max() >= infinity or part.max() >= negative:
            return False
    return True


def check_finite(raw: np.ndarray, dtype: str, name: str) -> None:
    """Raises InputError, which names the tensor, for a number that is none."""
    if not all_finite(raw, dtype):
        raise InputError(
            f"the weights '{name}' hold a number that is not finite (NaN or an infinity); nothing can be made of them: "
            "take an earlier checkpoint, or mend the model that they come from"
        )
