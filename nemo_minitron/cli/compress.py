"""`minitron compress`: the whole job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nemo_minitron.cli.nodes import Machines, Stall
from nemo_minitron.cli.options import Overriding
from nemo_minitron.errors import InputError
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import MACHINES, OUTPUT
from nemo_minitron.settings.layout import Layout

if TYPE_CHECKING:
    from nemo_minitron.job import Job

FOLDER = "The run folder; runs/NAME unless given."
DRY = "Print what would be done, and load nothing."
OVERWRITE = "Do stages of another recipe again there."
EXECUTOR = "local, docker, slurm, skypilot, or a name in NeMo-Run's executors.py; its settings are executor.key=value."


def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    layout: Annotated[dict[str, Any], Overriding(Layout, "layout")],
    machines: Machines,
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, e.g. distillation.tokens=2000")] = None,
    executor: Annotated[Optional[str], typer.Option(help=EXECUTOR, rich_help_panel=MACHINES)] = None,
    stall_timeout: Stall = SECONDS,
    out: Annotated[Optional[Path], typer.Option("--out", help=FOLDER, rich_help_panel=OUTPUT)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY, rich_help_panel=OUTPUT)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE, rich_help_panel=OUTPUT)] = False,
) -> None:
    """The whole job, resumable, into one run folder."""
    from nemo_minitron.cli.find import find
    from nemo_minitron.job.chain import describe_chain
    from nemo_minitron.job.dry_run import describe
    from nemo_minitron.settings.derive import fit_job
    from nemo_minitron.settings.precision import with_resolved_precisions

    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items()]
    settings = [*(overrides or []), *chosen]
    own = [setting for setting in settings if not setting.startswith("executor.")]
    if len(own) < len(settings) and not executor:
        raise InputError("settings of an executor need one; give --executor, or leave executor.key=value out")
    job = find(recipe).override(own)
    folder = job.folder(out)
    made = _executor(executor, [word for word in settings if word not in own], job, folder) if executor else None
    if dry_run or executor:  # what would be refused there is refused here
        text = (
            describe_chain(with_resolved_precisions(job), folder)
            if job.chain
            else describe(fit_job(with_resolved_precisions(job))[0])
        )
        if dry_run:
            print(text if executor else f"{text}\nnothing was loaded or written")
        if executor:
            command = ["compress", recipe, *own, "--out", str(folder.absolute()), *["--overwrite"] * overwrite]
            command += ["--stall-timeout", str(stall_timeout)] if stall_timeout != SECONDS else []
            _hand_over(made, job.name, command, dry_run)
        return
    from nemo_minitron.job.compress import run_compress

    machines = dataclasses.replace(machines, job=["compress", job.as_dict(), overwrite])  # the recipe, not its name
    machines.run(job.layout, folder, lambda: run_compress(job, folder, overwrite=overwrite))


def _executor(name: str, settings: list[str], job: Job, folder: Path) -> Any:
    """NeMo-Run's executor of the job, which works in this folder."""
    from nemo_minitron.launch import executors

    here, there = Path.cwd(), folder.absolute().parent
    return executors.executor_of(name, settings, job.layout, [here] if there.is_relative_to(here) else [here, there])


def _hand_over(executor: Any, name: str, command: list[str], dry_run: bool) -> None:
    """The same command as a task of NeMo-Run."""
    from nemo_minitron.launch import executors

    if dry_run:
        print(f"\n{executors.dry_run(executor, name, command)}")
    else:
        executors.submit(executor, name, command)
