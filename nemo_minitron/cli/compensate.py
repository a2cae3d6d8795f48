"""`minitron compensate`: a model, a plan and text -> what the cut changes, solved anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.options import (
    Cp,
    Data,
    Dp,
    Ep,
    Etp,
    Length,
    Pp,
    Precision,
    Seed,
    SkipBadLines,
    Sp,
    Stall,
    Tp,
    Vp,
)
from nemo_minitron.launch.stall import SECONDS


def compensate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    plan: Annotated[Path, typer.Argument(help="A plan of `minitron plan` that cuts neurons or heads.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out")] = Path("compensation.safetensors"),
    samples: Annotated[int, typer.Option("--samples", help="Rows of the corpus.")] = 64,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a micro-batch.")] = 1,
    ridge: Annotated[float, typer.Option("--ridge", help="Damping, as a part of the mean squared input.")] = 0.01,
    memory: Annotated[float, typer.Option("--memory", help="GB a rank for Gram matrices: layers at a time.")] = 4.0,
    precision: Precision = "fp32",
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    cp: Cp = 1,
    ep: Ep = 1,
    etp: Etp = 0,
    dp: Dp = 1,
    sp: Sp = False,
    skip_bad_lines: SkipBadLines = False,
    seed: Seed = 1234,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Solve anew what follows a cut of neurons or heads, by least squares on activations: forward passes only."""
    from nemo_minitron.commands.compensate import run_compensate
    from nemo_minitron.job import Calibration, Layout
    from nemo_minitron.settings.cutting import Cutting
    from nemo_minitron.settings.precision import resolve_precision

    cutting = Cutting(ridge=ridge, memory=memory)
    calibration = Calibration(samples, sequence_length, batch_size, precision=resolve_precision(precision), seed=seed)
    layout = Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=etp, dp=dp, sp=sp)
    found = run_compensate(
        model, plan, data, out, calibration, layout, ridge=ridge, memory=int(cutting.memory * 1e9),
        skip_bad_lines=skip_bad_lines,
    )  # fmt: skip
    print(f"{out}: {len(found.tensors)} matrices, from {samples * sequence_length:,} tokens")
