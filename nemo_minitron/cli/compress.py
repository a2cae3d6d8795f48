"""`minitron compress`: runs the whole job of a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nemo_minitron.cli.nodes import Machines, Stall
from nemo_minitron.cli.options import Log, Overriding
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.launch.stall import SECONDS
from nemo_minitron.schema import MACHINES, METHOD, OUTPUT
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.own_model import OwnModel
from nemo_minitron.settings.trackers import names_of, track
from nemo_minitron.settings.written import as_yaml

if TYPE_CHECKING:
    from nemo_run.core.execution.base import Executor

    from nemo_minitron.job import Job

RECIPE = "Name of a recipe, its file (.py, .yaml or .json), or your own model: a folder, a hub id, a checkpoint."
FOLDER = "The run folder. Default: runs/NAME."
DRY = "Print sizes, memory, stages and the recipe; load and write nothing."
JSON = "With --dry-run: print nothing but the recipe, every setting of it, as JSON."
SKIP = "Leave out the checks of the cut. It sets gates.run=false of the recipe."
OVERWRITE = "Redo stages in a run folder of another recipe."
EXECUTOR = (
    "Executor of NeMo-Run: local, docker, slurm, skypilot, or a name in its executors.py. executor.key=value sets it."
)


def compress(
    recipe: Annotated[str, typer.Argument(help=RECIPE)],
    own: OwnModel,
    layout: Annotated[dict[str, Any], Overriding(Layout, "layout")],
    machines: Machines,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Settings as key=value, e.g. distillation.tokens=2000.")
    ] = None,
    executor: Annotated[Optional[str], typer.Option(help=EXECUTOR, rich_help_panel=MACHINES)] = None,
    stall_timeout: Stall = SECONDS,
    out: Annotated[Optional[Path], typer.Option("--out", help=FOLDER, rich_help_panel=OUTPUT)] = None,
    skip_gates: Annotated[bool, typer.Option("--skip-gates", help=SKIP, rich_help_panel=METHOD)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY, rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON, rich_help_panel=OUTPUT)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE, rich_help_panel=OUTPUT)] = False,
    log: Log = "",
) -> None:
    """Run the whole job of a recipe, or of your own model, in one run folder. Run the command again to resume.

    minitron compress smollm2_135m_to_108m_width

    minitron compress path/to/model --data text.jsonl --params 0.7x
    """
    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items()]
    settings = [*(overrides or []), *chosen, *["gates.run=false"] * skip_gates]
    of_job = [setting for setting in settings if not setting.startswith("executor.")]
    of_executor = [setting for setting in settings if setting not in of_job]
    trackers = names_of(log)
    if as_json and not dry_run:
        raise InputError("--json prints the recipe of a --dry-run; give both")
    if of_executor and not executor:
        raise InputError("executor.key=value needs an executor; give --executor, or leave these settings out")
    job = _job(recipe, own, layout, of_job)
    folder = job.folder(out)
    backend = _executor(executor, of_executor, job, folder) if executor else None
    if dry_run or executor:  # a job that would be refused on the cluster is refused here
        text = _describe(job, folder, as_json)
        if dry_run:
            print(text if executor or as_json else f"{text}\n\nnothing was loaded or written")
        if executor:
            command = ["compress", recipe, *own.given, *of_job, "--out", str(folder.absolute())]
            command += [*["--overwrite"] * overwrite, *(["--log", log] if trackers else [])]
            command += ["--stall-timeout", str(stall_timeout)] if stall_timeout != SECONDS else []
            _hand_over(backend, job.name, command, dry_run)
        return
    from nemo_minitron.job.compress import run_compress

    track(log, folder)
    shown = f"the recipe, derived from your model, its text and this machine:\n\n{as_yaml(job)}" if own.given else ""
    # Nodes compare the recipe itself: the same name may be another recipe on another machine.
    machines = dataclasses.replace(machines, job=["compress", job.as_dict(), overwrite])
    machines.run(job.layout, folder, lambda: run_compress(job, folder, overwrite=overwrite, shown=shown))


def _job(recipe: str, own: OwnModel, layout: Mapping[str, Any], overrides: list[str]) -> Job:
    """The job of a recipe, or of a model with its text, with its overrides. Raises InputError for neither, and for a
    mixture of both."""
    from nemo_minitron.cli.find import find, is_model, is_recipe, names

    if not is_model(recipe):
        if own.given and not is_recipe(recipe):
            known = [path.name for path in Path().iterdir() if path.is_dir() and not path.name.startswith(".")]
            raise InputError(
                f"'{recipe}' is neither a model's folder here nor a recipe; {nearest(recipe, [*known, *names()])}"
            )
        if own.given:
            raise InputError(
                f"{own.given[0].partition('=')[0]} is for a model of your own, and '{recipe}' is a recipe; "
                "change the recipe with key=value, for example distillation.tokens=2000"
            )
        return find(recipe).override(overrides)
    from nemo_minitron.job.own_model import Machine, job_of

    return job_of(recipe, own, Machine.here(), Layout(**layout) if layout else None, overrides)


def _describe(job: Job, folder: Path, as_json: bool) -> str:
    """What the job would do, or its whole recipe as JSON. Raises InputError for what could not run."""
    from nemo_minitron.job.chain import describe_chain
    from nemo_minitron.job.dry_run import describe, fit_to_models
    from nemo_minitron.settings.derive import fit_job
    from nemo_minitron.settings.precision import with_resolved_precisions

    resolved = with_resolved_precisions(job)
    text = describe_chain(resolved, folder) if job.chain else describe(resolved)
    fitted = fit_job(resolved)[0]
    fitted = fitted if job.chain else fit_to_models(fitted, offline=True)[0]
    return json.dumps(fitted.as_dict(), indent=1) if as_json else text


def _executor(name: str, settings: list[str], job: Job, folder: Path) -> Executor:
    """NeMo-Run's executor for the job, which can reach its folder. Raises InputError for an unknown one, and if
    NeMo-Run is not installed."""
    try:
        from nemo_minitron.launch import executors
    except ModuleNotFoundError as error:
        if error.name != "nemo_run":
            raise
        raise InputError("--executor needs NeMo-Run; install it with: pip install nemo_run 'leptonai<0.28'") from None

    from nemo_minitron.job.chain import hours_of_job
    from nemo_minitron.settings.derive import fit_job

    hours = hours_of_job(fit_job(job)[0], folder)
    here, there = Path.cwd(), folder.absolute().parent
    folders = [here] if there.is_relative_to(here) else [here, there]
    return executors.executor_of(name, settings, job.layout, folders, hours)


def _hand_over(executor: Executor, name: str, command: list[str], dry_run: bool) -> None:
    """Submits the same command as a task of NeMo-Run, or prints the task."""
    from nemo_minitron.launch import executors

    if dry_run:
        print(f"\n{executors.dry_run(executor, name, command)}")
    else:
        executors.submit(executor, name, command)
