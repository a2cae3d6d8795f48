"""A Job -> its run folder, whole or as far as a stage."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.job.dry_run import check, check_space
from nemo_minitron.job.lock import locked
from nemo_minitron.job.precision import settled
from nemo_minitron.job.recipe import Job
from nemo_minitron.job.run import check_folder, execute, open_run
from nemo_minitron.job.stages import stages


def run_compress(job: Job, out: str | Path | None = None, until: str = "") -> Path:
    """`minitron compress`: the run folder, `runs/NAME` unless given; what is done there already is not done again.

    `until`: a stage's name; it and all that it rests on are done, the others left to a later call.
    Raises InputError for what cannot run, before anything is loaded or written.
    """
    job = settled(job)
    folder = Path(out or Path("runs") / job.name)
    check(job)
    check_space(job, folder)
    check_folder(folder)
    with locked(folder):
        run = open_run(job, folder)
        execute(run, stages(job), until)
    if not until:
        run.say(f"done: {run.folder}/student is the student, {run.folder}/report.html shows it")
    return folder
