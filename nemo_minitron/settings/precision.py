"""`precision=auto`: bf16 if the machine is fast at it, else fp32, never FP8; decided before anything is loaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.errors import InputError, nearest
from nemo_minitron.precisions import PRECISIONS, WIDE
from nemo_minitron.settings.recipe import Job

FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # flags of x86 and Arm processors that multiply in bf16


def best_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bf16 on a machine with an NVIDIA driver or a processor with bf16 instructions (twice as fast), else fp32."""
    if shutil.which("nvidia-smi"):
        return "bf16"
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:
        return "fp32"
    return "bf16" if flags & FLAGS else "fp32"


def resolve_precision(precision: str, legal: Sequence[str] = PRECISIONS) -> str:
    """The precision, with `auto` decided. Raises InputError for an unknown precision."""
    if precision != "auto" and precision not in legal:
        raise InputError(f"precision '{precision}' is unknown; {nearest(precision, (*legal, 'auto'))}")
    return best_precision() if precision == "auto" else precision


def with_resolved_precisions(job: Job) -> Job:
    """The job with every `auto` decided, as `recipe.json` records it. Raises InputError for an unknown precision.

    Evaluation and gates run in transformers, without FP8.
    """
    legal = {"calibration": PRECISIONS, "distillation": PRECISIONS, "evaluation": WIDE, "gates": WIDE}
    groups = {name: getattr(job, name) for name in legal}
    chosen = {n: dataclasses.replace(g, precision=resolve_precision(g.precision, legal[n])) for n, g in groups.items()}
    return dataclasses.replace(job, **chosen)
