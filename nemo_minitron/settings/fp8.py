"""Whether a model's matrices can be multiplied in FP8: Transformer Engine needs multiples of 16 on each rank.

The emulation of FP8 has no such limit and is checked too, so that what runs here also runs on a GPU.
"""

from __future__ import annotations

import math

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import axis
from nemo_minitron.errors import InputError
from nemo_minitron.precisions import ALIGN, BLOCK, FP8, token_multiple
from nemo_minitron.settings.layout import Layout

WIDTHS = ("hidden", "ffn", "heads", "query_groups", "expert_ffn", "shared_expert_ffn")


def check_fp8(architecture: Architecture, layout: Layout, precision: str) -> None:
    """Raises InputError, with the nearest legal size, if a rank's share of a matrix is no multiple of 16.

    fp8-blockwise under sequence parallelism also needs a hidden size of whole blocks: the ranks gather FP8 values.
    """
    from nemo_minitron.search.space import Divisors

    if architecture.hybrid_pattern and precision in FP8:
        raise InputError(f"{precision} is not supported for a hybrid with Mamba; legal are bf16 and fp32")
    if architecture.kv_lora_rank and precision in FP8:
        raise InputError(f"{precision} is not supported for multi-latent attention; legal are bf16 and fp32")
    for name in WIDTHS if precision in FP8 else ():
        tp = layout.expert_tp if name == "expert_ffn" else layout.tp
        size, divisor = axis(name).length(architecture), Divisors(ALIGN, tp, local=True).hard(architecture, name)
        if size and size % divisor:
            near = max(1, round(size / divisor)) * divisor
            raise InputError(
                f"{name}={size} is not legal in {precision} at tp={tp}, where matrices must be multiples of {ALIGN} on "
                f"a rank; the nearest legal size is {near} (plan with --divisors fp8,tp={tp})"
            )
    if precision == "fp8-blockwise" and layout.sp and layout.tp > 1 and architecture.hidden_size % BLOCK:
        near = max(1, round(architecture.hidden_size / BLOCK)) * BLOCK
        raise InputError(
            f"hidden={architecture.hidden_size} is not legal in {precision} under sequence parallelism, which gathers "
            f"blocks of {BLOCK}; the nearest legal size is {near}, or sp=false"
        )


def check_tokens(length: int, rows: int, layout: Layout, *precisions: str) -> None:
    """Raises InputError, with the nearest legal length, if a micro-batch of `rows` sequences of `length` tokens is no
    matrix that all of these precisions can multiply (`precisions.token_multiple`)."""
    for precision in precisions:
        multiple = layout.cp * token_multiple(FP8.get(precision), layout.tp if layout.sp else 1)
        if rows * length % multiple:
            step = multiple // math.gcd(multiple, rows)
            raise InputError(
                f"micro-batches of {rows} x {length} tokens are not legal in {precision}, where they must be a "
                f"multiple of {multiple}; the nearest legal length is {max(1, round(length / step)) * step}"
            )
