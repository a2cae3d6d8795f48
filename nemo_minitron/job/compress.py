"""Runs a Job in its run folder, to its end or as far as a stage."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.artifacts.temporary import sweep
from nemo_minitron.commands.corpus import say
from nemo_minitron.data import check_texts
from nemo_minitron.errors import InputError
from nemo_minitron.hosts import host_name
from nemo_minitron.job.chain import check_chain_space, fitted_jobs, summary, table
from nemo_minitron.job.dry_run import check, check_space, fit_to_models
from nemo_minitron.job.run import check_folder, check_recipe, execute, open_run, write_recipe
from nemo_minitron.job.stages.compress import stages
from nemo_minitron.job.stages.corpora import sources
from nemo_minitron.launch.lock import locked
from nemo_minitron.settings.derive import fit_job
from nemo_minitron.settings.precision import with_resolved_precisions
from nemo_minitron.settings.recipe import Job


def run_compress(
    job: Job, out: str | Path | None = None, until: str = "", overwrite: bool = False, shown: str = ""
) -> Path:
    """`minitron compress`: runs the job and returns its run folder, `out` or `runs/NAME`. Finished stages are skipped.

    The folder of a chain has a folder for each step. `until`: the name of a stage; only this stage and those that it
    depends on are run. `overwrite`: stages that another recipe finished in the folder may be redone. `shown`: what is
    printed before the first stage.
    Raises InputError for what cannot run, before anything is loaded or written.
    """
    host_name()
    job, remark = fit_job(with_resolved_precisions(job))
    say(remark)
    folder = job.folder(out)
    if job.chain:
        return _run_chain(job, folder, until, overwrite)
    fitted, remark = fit_to_models(job)
    say(remark)
    check(fitted)
    check_texts((*sources(job.data).values(), *job.evaluation.texts), job.data.skip_bad_lines)
    check_folder(folder)
    if not overwrite:
        check_recipe(job, folder)
    sweep(folder)
    check_space(job, folder)
    if shown:
        print(shown, flush=True)
    with locked(folder):
        run = dataclasses.replace(open_run(job, folder), job=fitted)
        execute(run, stages(job), until)
    if not until:
        run.say(f"done: {run.folder.student} is the student, {run.folder.report} shows it")
        run.say(f"next: {shlex.join(['minitron', 'chat', str(run.folder.student), '--beside', job.teacher])}")
    return folder


def _run_chain(job: Job, folder: Path, until: str, overwrite: bool) -> Path:
    """Runs every step in turn. Nothing is written before all steps are checked."""
    if until:
        raise InputError(
            f"each step of a chain has a stage '{until}'; run the recipe.json of one step, or the whole chain"
        )
    check_folder(folder)
    if not overwrite:
        check_recipe(job, folder)
    sweep(folder)
    check_chain_space(job, folder)
    with locked(folder):
        write_recipe(RunFolder(folder), job)
        for step, (step_job, remark) in zip(job.chain, fitted_jobs(job, folder), strict=True):
            print(f"== step {step.name}", flush=True)
            say(remark)
            run_compress(step_job, folder / step.name, overwrite=overwrite)
        rows = summary(job, folder)
        write_json(folder / RunFolder.chain, rows)
    print(table(rows), flush=True)
    return folder
