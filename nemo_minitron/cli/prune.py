"""`minitron prune`: a model and a plan -> the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.closing import beside, comes_next
from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Taking
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import ANY_MODEL, METHOD, OUTPUT
from nemo_minitron.settings.cutting import FOLD, GAPS, Cutting

COMPENSATION = "File of re-fitted matrices, of `minitron compensate` for this plan."
SCORES = "File of scores of `minitron estimate`, which --head-residual, --scale-gaps and --merge-experts need."
# --compensation decides whether matrices are re-fitted; the setting of that name plays no part here.
CUT = Taking("head_residual", "merge_experts", compensate=False, fold_norms=False, scale_gaps=False)


def prune(
    model: Annotated[str, typer.Argument(help=f"{ANY_MODEL}.")],
    plan: Annotated[Path, typer.Argument(help="Plan of `minitron plan`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the student.")],
    cutting: Annotated[Cutting, CUT],
    compensation: Annotated[Optional[Path], typer.Option(help=COMPENSATION, rich_help_panel=METHOD)] = None,
    fold_norms: Annotated[bool, typer.Option("--fold-norms", help=FOLD, rich_help_panel=METHOD)] = False,
    scale_gaps: Annotated[bool, typer.Option("--scale-gaps", help=GAPS, rich_help_panel=METHOD)] = False,
    scores: Annotated[Optional[Path], typer.Option(help=SCORES, rich_help_panel=METHOD)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder.", rich_help_panel=OUTPUT)
    ] = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Cut a model as a plan says: a Hugging Face folder, or a checkpoint to one of the host that runs this.

    minitron prune MODEL plan.json student --compensation compensation.safetensors
    """
    from nemo_minitron.commands.prune import Extras, run_prune
    from nemo_minitron.families import remark_on, remarks
    from nemo_minitron.sources.open import config_of

    residual = cutting.head_residual or None
    extras = Extras(compensation, fold_norms, residual, scores, scale_gaps, cutting.merge_experts)
    student = run_prune(model, plan, out, overwrite, extras)
    print(f"{out}: {student.parameters():,} parameters")
    config = config_of(model)
    for sentence in (*remarks(config), remark_on(student, config)):
        if sentence:
            print(f"remark: {sentence}")
    if (out / "config.json").is_file():  # a checkpoint is trained by the user's own script
        comes_next("distill", out, "--teacher", model, "--data", "TEXT", "--out", beside(out, "distilled"))
