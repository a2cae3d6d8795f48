"""`minitron report` and `minitron doctor`: what was made, and what it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.schema import OUTPUT


def report(run: Annotated[Path, typer.Argument(help="Run folder of `minitron compress`.")]) -> None:
    """report.html, the figures, and the CSV behind each."""
    from nemo_minitron.export import write_report

    print(write_report(run))


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """What is installed, whether it fits together, and what to run to mend it."""
    from nemo_minitron.backend.doctor import examine

    found = examine()
    print(found.json() if as_json else found.text())
    raise typer.Exit(0 if found.ok else 1)
