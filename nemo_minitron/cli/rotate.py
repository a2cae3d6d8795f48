"""`minitron rotate`: a model and text -> the same model in rotated coordinates, before a cut of hidden channels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Data, SkipBadLines, Taking
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import OUTPUT
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout

OUT = "New folder for the rotated model."
MODEL = "Hugging Face folder or hub id of a model with RMSNorm."
ROWS = Taking("samples", "sequence_length", "batch_size", "precision", "seed")


def rotate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Data,
    calibration: Annotated[Calibration, ROWS],
    layout: Layout,
    skip_bad_lines: SkipBadLines = False,
    out: Annotated[Path, typer.Option("--out", help=OUT, rich_help_panel=OUTPUT)] = Path("rotated"),
    stall_timeout: Stall = SECONDS,
) -> None:
    """Rotate the residual stream to its principal axes, so that a cut of hidden channels loses less, with forward
    passes only.

    minitron rotate MODEL --data text.jsonl --out rotated
    """
    from nemo_minitron.commands.rotate import describe, run_rotate

    rotation = run_rotate(model, data, out, calibration, layout, skip_bad_lines=skip_bad_lines)
    print(f"{out}: {describe(rotation)}")
    comes_next("estimate", out, "--data", data)
