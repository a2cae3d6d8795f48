"""`minitron prune`: a model and a plan -> the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.options import Stall
from nemo_minitron.launch.stall import SECONDS

RESIDUAL = "Add pruned heads' differences to those that stay: paper, or laco for the other sign; needs --scores."


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    plan: Annotated[Path, typer.Argument(help="A plan of `minitron plan`.")],
    out: Annotated[Path, typer.Argument(help="The student's folder.")],
    compensation: Annotated[Optional[Path], typer.Option(help="Of `minitron compensate`, for this plan.")] = None,
    fold_norms: Annotated[bool, typer.Option("--fold-norms", help="Scale norms for the hidden cut.")] = False,
    head_residual: Annotated[Optional[str], typer.Option(help=RESIDUAL)] = None,
    scores: Annotated[Optional[Path], typer.Option(help="Of `minitron estimate`: the order of the heads.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Cut a model as a plan says: Hugging Face folder to folder, NeMo checkpoint to NeMo checkpoint."""
    from nemo_minitron.commands.prune import Extras, run_prune
    from nemo_minitron.families import remark_on, remarks
    from nemo_minitron.sources.open import config_of

    extras = Extras(compensation, fold_norms, head_residual, scores)
    student = run_prune(model, plan, out, overwrite, extras)
    print(f"{out}: {student.parameters():,} parameters")
    config = config_of(model)
    for sentence in (*remarks(config), remark_on(student, config)):
        if sentence:
            print(f"remark: {sentence}")
