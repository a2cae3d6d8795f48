"""`minitron compress`: the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nemo_minitron.cli.nodes import Count, Meeting, Rank, on_nodes
from nemo_minitron.cli.options import Stall
from nemo_minitron.errors import InputError
from nemo_minitron.launch.stall import SECONDS

if TYPE_CHECKING:
    from nemo_minitron.job import Job

EXECUTOR = "local, docker, slurm, skypilot, or a name in NeMo-Run's executors.py; its settings are executor.key=value."


def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, e.g. distillation.tokens=2000")] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="The run folder [default: runs/NAME].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and load nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do stages of another recipe again there.")] = False,
    tp: Annotated[Optional[int], typer.Option("--tp", help="Tensor-parallel size; layout.tp of the recipe.")] = None,
    pp: Annotated[Optional[int], typer.Option("--pp", help="Pipeline stages; layout.pp.")] = None,
    vp: Annotated[Optional[int], typer.Option("--vp", help="Virtual stages a pipeline stage; layout.vp.")] = None,
    cp: Annotated[Optional[int], typer.Option("--cp", help="Context-parallel size; layout.cp.")] = None,
    ep: Annotated[Optional[int], typer.Option("--ep", help="Expert-parallel size; layout.ep.")] = None,
    dp: Annotated[Optional[int], typer.Option("--dp", help="Data-parallel size; layout.dp.")] = None,
    sp: Annotated[Optional[bool], typer.Option("--sp/--no-sp", help="Sequence parallelism; layout.sp.")] = None,
    nodes: Count = None,
    node_rank: Rank = None,
    rendezvous: Meeting = None,
    executor: Annotated[Optional[str], typer.Option("--executor", help=EXECUTOR)] = None,
    stall_timeout: Stall = SECONDS,
) -> None:
    """The whole job, resumable, into one run folder."""
    from nemo_minitron.cli.find import find
    from nemo_minitron.job.chain import describe_chain
    from nemo_minitron.job.dry_run import describe
    from nemo_minitron.settings.precision import with_resolved_precisions

    layout = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "dp": dp, "sp": sp}
    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items() if value is not None]
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
            else describe(with_resolved_precisions(job))
        )
        if dry_run:
            print(text if executor else f"{text}\nnothing was loaded or written")
        if executor:
            command = ["compress", recipe, *own, "--out", str(folder.absolute()), *["--overwrite"] * overwrite]
            command += ["--stall-timeout", str(stall_timeout)] if stall_timeout != SECONDS else []
            _hand_over(made, job.name, command, dry_run)
        return
    from nemo_minitron.job.compress import run_compress

    place = (nodes, node_rank, rendezvous)
    same = ["compress", job.as_dict(), overwrite]
    on_nodes(place, job.layout, same, folder, lambda: run_compress(job, folder, overwrite=overwrite))


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
