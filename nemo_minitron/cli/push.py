"""`minitron push`: a student's folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.schema import OUTPUT

REPO = "Repository OWNER/NAME on the hub; it is made if it does not exist."
PUBLIC = "Make a new repository public. An existing one stays as it is."
MESSAGE = "Message of the commit."


def push(
    student: Annotated[Path, typer.Argument(help="Hugging Face folder of a student, with its card.")],
    repo: Annotated[str, typer.Argument(help=REPO)],
    public: Annotated[bool, typer.Option("--public", help=PUBLIC, rich_help_panel=OUTPUT)] = False,
    message: Annotated[str, typer.Option(help=MESSAGE, rich_help_panel=OUTPUT)] = "",
) -> None:
    """Upload a student to the Hugging Face hub, with its card and figures. Log in first: `hf auth login`, or HF_TOKEN.

    minitron push runs/demo/student me/my-smaller-model
    """
    from nemo_minitron.commands.corpus import begin
    from nemo_minitron.export.push import check_push
    from nemo_minitron.export.push import push as upload

    check_push(student, repo)
    begin(f"uploading {student} to {repo}")
    print(f"{upload(student, repo, private=not public, message=message)}")
    print(f'next: AutoModelForCausalLM.from_pretrained("{repo}")')
