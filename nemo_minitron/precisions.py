"""The precisions of a model by name, and what of Megatron's each one is; plain data, which every room may read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_minitron.errors import InputError, nearest

WIDE = ("fp32", "bf16")
FP8 = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}  # -> Megatron's fp8_recipe
PRECISIONS = (*WIDE, *FP8)
ALIGN = 16  # what the dimensions of an FP8 matrix must be multiples of
BLOCK = 128  # values that have one scale in fp8-blockwise
HISTORY = 1024  # steps whose largest values fp8-delayed remembers, as in NeMo's own recipe
EMULATED = "emulated_fp8"  # the field of a config that names the recipe of the emulation


def check_precision(precision: str, legal: Sequence[str] = PRECISIONS) -> None:
    """Raises InputError for an unknown precision."""
    if precision not in legal:
        raise InputError(f"precision '{precision}' is unknown here; {nearest(precision, legal)}")


def token_multiple(recipe: str | None, parts: int = 1) -> int:
    """What the tokens of a micro-batch on a rank must be a multiple of, in one of Megatron's recipes (None: no FP8).

    `parts`: into how many sequence parallelism cuts them. Transformer Engine multiplies FP8 matrices of 8 tokens at
    least and sums over 16 in a weight's gradient; blocks that are gathered over the parts are whole ones on each.
    """
    if recipe is None:
        return 1
    return math.lcm(ALIGN, (BLOCK if recipe == "blockwise" else 8) * parts if parts > 1 else 1)


def weights_in(precision: str) -> str:
    """fp32 or bf16: what parameters are kept in. Under FP8 they are bf16, cast for each matrix product.

    Raises InputError for an unknown precision.
    """
    check_precision(precision)
    return "bf16" if precision in FP8 else precision
