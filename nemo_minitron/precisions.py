"""The precisions of a model by name, and what of Megatron's each one is; plain data, which every room may read."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.errors import InputError, nearest

WIDE = ("fp32", "bf16")
FP8 = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}  # -> Megatron's fp8_recipe
PRECISIONS = (*WIDE, *FP8)
ALIGN = 16  # what the dimensions of an FP8 matrix must be multiples of


def check_precision(precision: str, legal: Sequence[str] = PRECISIONS) -> None:
    """Raises InputError for an unknown precision."""
    if precision not in legal:
        raise InputError(f"precision '{precision}' is unknown here; {nearest(precision, legal)}")


def weights_in(precision: str) -> str:
    """fp32 or bf16: what parameters are kept in. Under FP8 they are bf16, cast for each matrix product.

    Raises InputError for an unknown precision.
    """
    check_precision(precision)
    return "bf16" if precision in FP8 else precision
