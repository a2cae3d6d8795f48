"""`minitron prune`: a model and a plan -> the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    plan: Annotated[Path, typer.Argument(help="A plan of `minitron plan`.")],
    out: Annotated[Path, typer.Argument(help="The student's folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Cut a model as a plan says: Hugging Face folder to folder, NeMo checkpoint to NeMo checkpoint."""
    from nemo_minitron.job.commands.prune import run_prune

    print(f"{out}: {run_prune(model, plan, out, overwrite).parameters():,} parameters")
