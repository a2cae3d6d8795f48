"""`minitron finetune`: tunes a distilled student on instructions, as the papers do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.closing import comes_next
from nemo_minitron.cli.nodes import Stall
from nemo_minitron.cli.options import Log
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import MODEL, OUTPUT
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.trackers import track

ROWS = "JSONL file; each row has the texts input and output."


def finetune(
    student: Annotated[str, typer.Argument(help="Hugging Face folder, such as a run's student.")],
    data: Annotated[Path, typer.Option("--data", help=ROWS, rich_help_panel=MODEL)],
    out: Annotated[
        Path, typer.Option("--out", help="Hugging Face folder of the tuned student.", rich_help_panel=OUTPUT)
    ],
    settings: Finetuning,
    layout: Layout,
    log: Log = "",
    stall_timeout: Stall = SECONDS,
) -> None:
    """Tune a student on instructions, in the host's own loop. Run the command again to resume.

    minitron finetune student --data prompts.jsonl --steps 200 --out tuned
    """
    from nemo_minitron.commands.finetune import run_finetune

    track(log, out)

    trained = run_finetune(student, data, out, settings, layout)
    print(f"{out}: tuned in {trained.steps} steps of {trained.global_batch_size} rows")
    comes_next("chat", out)
