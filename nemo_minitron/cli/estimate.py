"""`minitron estimate`: a model and text -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.options import Data, Dp, Length, Pp, Precision, Seed, Sp, Tp, Vp


def estimate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out")] = Path("scores.safetensors"),
    samples: Annotated[int, typer.Option("--samples")] = 1024,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    criterion: Annotated[str, typer.Option("--criterion", help="batch,sequence: mean, l2, var or max.")] = "l2,mean",
    norms: Annotated[str, typer.Option("--norms", help="all or layers: which norms `hidden` sums.")] = "all",
    precision: Precision = "fp32",
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    dp: Dp = 1,
    sp: Sp = False,
    seed: Seed = 1234,
) -> None:
    """Score what matters, with forward passes only."""
    from nemo_minitron.job import Calibration, Layout
    from nemo_minitron.job.commands.estimate import run_estimate
    from nemo_minitron.job.precision import settle

    calibration = Calibration(samples, sequence_length, batch_size, criterion, norms, settle(precision), seed)
    layout = Layout(tp=tp, pp=pp, vp=vp, dp=dp, sp=sp)
    scores = run_estimate(model, data, out, calibration, layout)
    print(f"{out}: {scores.samples} samples, {scores.tokens:,} tokens, criterion {scores.criterion}")
