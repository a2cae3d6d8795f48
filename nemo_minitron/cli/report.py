"""`minitron report` shows a run; `minitron doctor` checks what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.schema import OUTPUT


def report(run: Annotated[Path, typer.Argument(help="Run folder of `minitron compress`.")]) -> None:
    """Write report.html, its figures, and a CSV file for each figure.

    minitron report runs/demo
    """
    from nemo_minitron.export import write_report

    print(f"{write_report(run)}: one file for a browser; its figures and their data are in {RunFolder(run).figures}")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Check what is installed and whether it fits together, and say how to mend what does not.

    minitron doctor
    """
    from nemo_minitron.backend.doctor import examine
    from nemo_minitron.hosts import chosen

    diagnosis = examine(*chosen())
    print(diagnosis.json() if as_json else diagnosis.text())
    raise typer.Exit(0 if diagnosis.ok else 1)
