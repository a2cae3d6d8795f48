"""`minitron compress`: runs the whole job of a recipe."""

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
    from nemo_run.core.execution.base import Executor

    from nemo_minitron.job import Job

FOLDER = "The run folder. Default: runs/NAME."
DRY = "Print the recipe, sizes, memory and stages; load and write nothing."
OVERWRITE = "Redo stages in a run folder of another recipe."
EXECUTOR = (
    "Executor of NeMo-Run: local, docker, slurm, skypilot, or a name in its executors.py. executor.key=value sets it."
)


def compress(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or its file: .py, .yaml or .json.")],
    layout: Annotated[dict[str, Any], Overriding(Layout, "layout")],
    machines: Machines,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Settings as key=value, e.g. distillation.tokens=2000.")
    ] = None,
    executor: Annotated[Optional[str], typer.Option(help=EXECUTOR, rich_help_panel=MACHINES)] = None,
    stall_timeout: Stall = SECONDS,
    out: Annotated[Optional[Path], typer.Option("--out", help=FOLDER, rich_help_panel=OUTPUT)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY, rich_help_panel=OUTPUT)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE, rich_help_panel=OUTPUT)] = False,
) -> None:
    """Run the whole job of a recipe, in one run folder. Run the command again to resume."""
    from nemo_minitron.cli.find import find

    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items()]
    settings = [*(overrides or []), *chosen]
    of_job = [setting for setting in settings if not setting.startswith("executor.")]
    of_executor = [setting for setting in settings if setting not in of_job]
    if of_executor and not executor:
        raise InputError("executor.key=value needs an executor; give --executor, or leave these settings out")
    job = find(recipe).override(of_job)
    folder = job.folder(out)
    backend = _executor(executor, of_executor, job, folder) if executor else None
    if dry_run or executor:  # so that a job that the cluster would refuse is refused here
        text = _describe(job, folder)
        if dry_run:
            print(text if executor else f"{text}\nnothing was loaded or written")
        if executor:
            command = ["compress", recipe, *of_job, "--out", str(folder.absolute()), *["--overwrite"] * overwrite]
            command += ["--stall-timeout", str(stall_timeout)] if stall_timeout != SECONDS else []
            _hand_over(backend, job.name, command, dry_run)
        return
    from nemo_minitron.job.compress import run_compress

    # Nodes compare the recipe itself: the same name may be another recipe on another machine.
    machines = dataclasses.replace(machines, job=["compress", job.as_dict(), overwrite])
    machines.run(job.layout, folder, lambda: run_compress(job, folder, overwrite=overwrite))


def _describe(job: Job, folder: Path) -> str:
    """What the job would do. Raises InputError for what could not run."""
    from nemo_minitron.job.chain import describe_chain
    from nemo_minitron.job.dry_run import describe
    from nemo_minitron.settings.precision import with_resolved_precisions

    resolved = with_resolved_precisions(job)
    return describe_chain(resolved, folder) if job.chain else describe(resolved)


def _executor(name: str, settings: list[str], job: Job, folder: Path) -> Executor:
    """NeMo-Run's executor for the job, which can reach its folder. Raises InputError for an unknown one."""
    from nemo_minitron.launch import executors

    here, there = Path.cwd(), folder.absolute().parent
    return executors.executor_of(name, settings, job.layout, [here] if there.is_relative_to(here) else [here, there])


def _hand_over(executor: Executor, name: str, command: list[str], dry_run: bool) -> None:
    """Submits the same command as a task of NeMo-Run, or prints the task."""
    from nemo_minitron.launch import executors

    if dry_run:
        print(f"\n{executors.dry_run(executor, name, command)}")
    else:
        executors.submit(executor, name, command)
