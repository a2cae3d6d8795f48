"""`minitron prune`: a model and a plan -> the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Taking
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import METHOD, OUTPUT
from nemo_minitron.settings.cutting import Cutting

SOLVED = "Of `minitron compensate`, for this plan."
SCORES = "Of `minitron estimate`: the order of the heads."
# Whether matrices are fitted anew is said by the file that is given, not by a setting.
CUT = Taking("fold_norms", "head_residual", compensate=False)


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    plan: Annotated[Path, typer.Argument(help="A plan of `minitron plan`.")],
    out: Annotated[Path, typer.Argument(help="The student's folder.")],
    cutting: Annotated[Cutting, CUT],
    compensation: Annotated[Optional[Path], typer.Option(help=SOLVED, rich_help_panel=METHOD)] = None,
    scores: Annotated[Optional[Path], typer.Option(help=SCORES, rich_help_panel=METHOD)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.", rich_help_panel=OUTPUT)
    ] = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Cut a model as a plan says: Hugging Face folder to folder, NeMo checkpoint to NeMo checkpoint."""
    from nemo_minitron.commands.prune import Extras, run_prune
    from nemo_minitron.families import remark_on, remarks
    from nemo_minitron.sources.open import config_of

    extras = Extras(compensation, cutting.fold_norms, cutting.head_residual or None, scores)
    student = run_prune(model, plan, out, overwrite, extras)
    print(f"{out}: {student.parameters():,} parameters")
    config = config_of(model)
    for sentence in (*remarks(config), remark_on(student, config)):
        if sentence:
            print(f"remark: {sentence}")
