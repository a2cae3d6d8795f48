"""A Job -> its run folder, whole or as far as a stage."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.artifacts.temporary import sweep
from nemo_minitron.commands.corpus import say
from nemo_minitron.errors import InputError
from nemo_minitron.job.chain import check_chain_space, jobs_of, summary, table
from nemo_minitron.job.dry_run import check, check_space
from nemo_minitron.job.run import check_folder, check_recipe, execute, open_run
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.launch.lock import locked
from nemo_minitron.settings.derive import fit_job
from nemo_minitron.settings.precision import with_resolved_precisions
from nemo_minitron.settings.recipe import Job


def run_compress(job: Job, out: str | Path | None = None, until: str = "", overwrite: bool = False) -> Path:
    """`minitron compress`: the run folder, `runs/NAME` unless given; what is done there already is not done again.

    Of a chain, a folder with one for each step. `until`: a stage's name; it and all that it rests on are done, the
    others left to a later call. `overwrite`: stages of another recipe that are done in the folder may be done again.
    Raises InputError for what cannot run, before anything is loaded or written.
    """
    job, remark = fit_job(with_resolved_precisions(job))
    say(remark)
    folder = job.folder(out)
    if job.chain:
        return _run_chain(job, folder, until, overwrite)
    check(job)
    check_folder(folder)
    if not overwrite:
        check_recipe(job, folder)
    sweep(folder)
    check_space(job, folder)
    with locked(folder):
        run = open_run(job, folder)
        execute(run, stages(job), until)
    if not until:
        run.say(f"done: {run.folder.student} is the student, {run.folder.report} shows it")
    return folder


def _run_chain(job: Job, folder: Path, until: str, overwrite: bool) -> Path:
    """Every step in turn; nothing is written before all of them are checked."""
    if until:
        raise InputError(f"a chain has a stage '{until}' in each step; run the recipe.json of one, or the whole chain")
    check_folder(folder)
    if not overwrite:
        check_recipe(job, folder)
    sweep(folder)
    check_chain_space(job, folder)
    with locked(folder):
        write_json(folder / RunFolder.recipe, job.as_dict())
        for step, made in zip(job.chain, jobs_of(job, folder), strict=True):
            print(f"== step {step.name}", flush=True)
            run_compress(made, folder / step.name, overwrite=overwrite)
        rows = summary(job, folder)
        write_json(folder / RunFolder.chain, rows)
    print(table(rows), flush=True)
    return folder
