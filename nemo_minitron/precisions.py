"""The names of the precisions, and Megatron's setting for each; plain data that every room may read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_minitron.errors import InputError, nearest

WIDE = ("fp32", "bf16")
FP8 = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}  # -> Megatron's fp8_recipe
PRECISIONS = (*WIDE, *FP8)
ALIGN = 16  # the dimensions of an FP8 matrix must be multiples of this
BLOCK = 128  # so many values share one scale in fp8-blockwise
HISTORY = 1024  # fp8-delayed remembers the largest values of so many steps, as in NeMo's own recipe
EMULATED = "emulated_fp8"  # the field of a config that names the recipe of the emulation


def check_precision(precision: str, legal: Sequence[str] = PRECISIONS) -> None:
    """Raises InputError for an unknown precision."""
    if precision not in legal:
        raise InputError(f"precision '{precision}' is unknown here; {nearest(precision, legal)}")


def token_multiple(recipe: str | None, parts: int = 1) -> int:
    """The number that the tokens of a micro-batch on a rank must be a multiple of under a recipe of Megatron's.

    `recipe` None: no FP8, so any number is legal. `parts`: sequence parallelism cuts the tokens into so many parts.
    Transformer Engine multiplies FP8 matrices of at least 8 tokens, and sums over 16 in the gradient of a weight. Each
    part must hold whole blocks, because the blocks are gathered over the parts.
    """
    if recipe is None:
        return 1
    return math.lcm(ALIGN, (BLOCK if recipe == "blockwise" else 8) * parts if parts > 1 else 1)


def weights_in(precision: str) -> str:
    """The dtype of the stored parameters, fp32 or bf16. Under FP8 they are bf16 and are cast for each matrix product.

    Raises InputError for an unknown precision.
    """
    check_precision(precision)
    return "bf16" if precision in FP8 else precision
