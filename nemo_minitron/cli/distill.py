"""`minitron distill`: trains a student on its teacher's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Machines, Stall
from nemo_minitron.cli.options import Data, Log, SkipBadLines
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import ANY_MODEL, METHOD, MODEL, OUTPUT
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.trackers import track

TEACHER = f"The teacher: {ANY_MODEL}."


def distill(
    student: Annotated[str, typer.Argument(help="Hugging Face folder of the pruned student.")],
    *,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", help="Hugging Face folder of the distilled student.", rich_help_panel=OUTPUT)
    ],
    teacher: Annotated[Optional[str], typer.Option(help=TEACHER, rich_help_panel=MODEL)] = None,
    settings: Distillation,
    layout: Layout,
    machines: Machines,
    plan: Annotated[
        Optional[Path],
        typer.Option(
            help="Plan that made the student; --intermediate auto reads the kept layers from it.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    validation: Annotated[
        Optional[str], typer.Option(help="Held-out text, for --validate-every.", rich_help_panel=MODEL)
    ] = None,
    skip_bad_lines: SkipBadLines = False,
    log: Log = "",
    stall_timeout: Stall = SECONDS,
) -> None:
    """Train a student on the teacher's logits. Run the command again to resume.

    minitron distill student --teacher MODEL --data text.jsonl --tokens 4M --out distilled
    """
    from nemo_minitron.commands.distill import run_distill

    track(log, out)

    def command() -> None:
        trained = run_distill(
            student, teacher, data, out, settings, layout, validation=validation, plan=plan,
            skip_bad_lines=skip_bad_lines,
        )  # fmt: skip
        print(f"{out}: distilled on {trained.steps * trained.tokens_per_step:,} tokens")
        comes_next("chat", out, *(("--beside", teacher) if teacher else ()))

    machines.run(layout, out, command)
