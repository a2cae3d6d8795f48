"""`minitron compensate`: a model, a plan and text -> the re-fitted matrices that lose inputs to the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Data, Overwrite, SkipBadLines, Taking
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import ANY_MODEL, METHOD, OUTPUT
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.cutting import FILL, Cutting
from nemo_minitron.settings.layout import Layout

OUT = "File of the re-fitted matrices, for `minitron prune --compensation`."
ROWS = Taking(
    "samples", "sequence_length", "batch_size", "precision", "seed"
)  # what else a calibration scores plays no part here


def compensate(
    model: Annotated[str, typer.Argument(help=f"{ANY_MODEL}.")],
    plan: Annotated[Path, typer.Argument(help="Plan of `minitron plan` that cuts neurons, heads or layers.")],
    data: Data,
    calibration: Annotated[Calibration, ROWS],
    cutting: Annotated[Cutting, Taking("ridge", "memory", "reconstruct", "reconstruct_batch")],
    layout: Layout,
    fill_gaps: Annotated[bool, typer.Option("--fill-gaps", help=FILL, rich_help_panel=METHOD)] = False,
    skip_bad_lines: SkipBadLines = False,
    out: Annotated[Path, typer.Option("--out", help=OUT, rich_help_panel=OUTPUT)] = Path("compensation.safetensors"),
    overwrite: Overwrite = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Re-fit the matrices that lose inputs to the cut, by least squares on activations, with forward passes only.

    minitron compensate MODEL plan.json --data text.jsonl --out compensation.safetensors
    """
    from nemo_minitron.commands.compensate import run_compensate

    compensation = run_compensate(
        model, plan, data, out, calibration, layout, ridge=cutting.ridge, memory=int(cutting.memory * 1e9),
        reconstruct=cutting.reconstruct, reconstruct_batch=cutting.reconstruct_batch,
        fill_gaps=fill_gaps, skip_bad_lines=skip_bad_lines, overwrite=overwrite,
    )  # fmt: skip
    print(f"{out}: {len(compensation.tensors)} matrices")
    comes_next("prune", model, plan, "STUDENT", "--compensation", out)
