"""Whether a model's matrices can be multiplied in FP8: Transformer Engine wants multiples of 16, on each rank."""

from __future__ import annotations

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import axis
from nemo_minitron.errors import InputError
from nemo_minitron.job.settings.layout import Layout
from nemo_minitron.precisions import ALIGN, FP8
from nemo_minitron.search.space import Divisors

WIDTHS = ("hidden", "ffn", "heads", "query_groups", "expert_ffn", "shared_expert_ffn")


def check_fp8(architecture: Architecture, layout: Layout, precision: str) -> None:
    """Raises InputError, with the nearest legal size, where a rank's share of a matrix is no multiple of 16.

    Also where FP8 is emulated, which could do it: what runs here then runs on a GPU.
    """
    for name in WIDTHS if precision in FP8 else ():
        tp = layout.expert_tp if name == "expert_ffn" else layout.tp
        size, divisor = axis(name).length(architecture), Divisors(ALIGN, tp, local=True).hard(architecture, name)
        if size and size % divisor:
            near = max(1, round(size / divisor)) * divisor
            raise InputError(
                f"{name}={size} is not legal in {precision} at tp={tp}, where matrices must be multiples of {ALIGN} on "
                f"a rank; the nearest legal size is {near} (plan with --divisors fp8,tp={tp})"
            )
