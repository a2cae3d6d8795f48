"""`minitron estimate`: a model and text -> importance scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Machines, Stall
from nemo_minitron.cli.options import Data, Overwrite, SkipBadLines
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import ANY_MODEL, MODEL, OUTPUT
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.layout import Layout

OUT = "File of the scores."
MERGE = "Scores of the same model on other rows, to merge in."


def estimate(
    model: Annotated[str, typer.Argument(help=f"{ANY_MODEL}.")],
    data: Data,
    calibration: Calibration,
    layout: Layout,
    machines: Machines,
    merge: Annotated[Optional[Path], typer.Option(help=MERGE, rich_help_panel=MODEL)] = None,
    skip_bad_lines: SkipBadLines = False,
    out: Annotated[Path, typer.Option("--out", help=OUT, rich_help_panel=OUTPUT)] = Path("scores.safetensors"),
    overwrite: Overwrite = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Score the units of a model, by forward passes. Run the command again to resume.

    minitron estimate MODEL --data text.jsonl --out scores.safetensors
    """
    from nemo_minitron.commands.estimate import describe_scores, run_estimate

    def command() -> None:
        scores = run_estimate(model, data, out, calibration, layout, merge, skip_bad_lines, overwrite)
        print(f"{out}: {scores.samples} samples, {scores.tokens:,} tokens, criterion {scores.criterion}")
        for line in describe_scores(scores):
            print(f"  {line}")
        comes_next("plan", out, "--params", "0.7x")

    machines.run(layout, out, command)
