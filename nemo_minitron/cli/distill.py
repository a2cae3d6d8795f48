"""`minitron distill`: a student learns from its teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.nodes import Machines, Stall
from nemo_minitron.cli.options import Data, SkipBadLines
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import METHOD, MODEL, OUTPUT
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.layout import Layout

TEACHER = "Hugging Face folder, hub id or NeMo checkpoint."


def distill(
    student: Annotated[str, typer.Argument(help="Hugging Face folder of the pruned student.")],
    *,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The distilled Hugging Face folder.", rich_help_panel=OUTPUT)],
    teacher: Annotated[Optional[str], typer.Option(help=TEACHER, rich_help_panel=MODEL)] = None,
    settings: Distillation,
    layout: Layout,
    machines: Machines,
    plan: Annotated[
        Optional[Path], typer.Option(help="The plan that the student comes from.", rich_help_panel=METHOD)
    ] = None,
    validation: Annotated[Optional[str], typer.Option(help="Held-out text.", rich_help_panel=MODEL)] = None,
    skip_bad_lines: SkipBadLines = False,
    stall_timeout: Stall = SECONDS,
) -> None:
    """Retrain a student from the teacher's logits; run again after a kill, it goes on."""
    from nemo_minitron.commands.distill import run_distill

    def command() -> None:
        trained = run_distill(
            student, teacher, data, out, settings, layout, validation=validation, plan=plan,
            skip_bad_lines=skip_bad_lines,
        )  # fmt: skip
        print(f"{out}: distilled on {trained.steps * trained.tokens_per_step:,} tokens")

    machines.run(layout, out, command)
