"""A chain: teacher -> student -> smaller student. Each step is an ordinary job in a folder of its own.

A step cuts the student of the step before it. Its student learns from the first teacher unless the step says otherwise.
In a step's own numbers and report "teacher" is the model that it cuts; `chain.json` has the numbers of all steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.files import need_space
from nemo_minitron.artifacts.json_types import HfConfig, JsonObject
from nemo_minitron.artifacts.records import read_numbers
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.families import to_hf
from nemo_minitron.job.dry_run import (
    Known,
    check,
    fit_to_models,
    hours_of,
    lines_of,
    recipe_lines,
    remark_lines,
    space_left,
)
from nemo_minitron.job.teacher import teacher_config
from nemo_minitron.settings.derive import fit_job
from nemo_minitron.settings.precision import with_resolved_precisions
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.step import FIRST, OPEN, Step


def jobs_of(job: Job, folder: Path) -> list[Job]:
    """The job of each step, as in `fitted_jobs`."""
    return [step for step, _ in fitted_jobs(job, folder)]


def fitted_jobs(job: Job, folder: Path) -> list[tuple[Job, str]]:
    """(job, remark on its derived sizes) of each step, with every precision decided. Raises InputError for an unknown
    setting."""
    fitted: list[tuple[Job, str]] = []
    for number, step in enumerate(job.chain):
        with _named(step):
            fitted.append(fit_job(with_resolved_precisions(_job_of(job, folder, number))))
    return fitted


def _job_of(job: Job, folder: Path, number: int) -> Job:
    step, before, run = job.chain[number], job.chain[:number], RunFolder(folder)
    values = job.as_dict() | {"name": f"{job.name}-{step.name}", "chain": []}
    values |= {"keep": step.keep, "rounds": step.rounds, "search": dataclasses.asdict(step.search)}
    for group in OPEN:
        values[group] |= getattr(step, group)
    if before:
        values |= {"teacher": str(run.step(before[-1].name).student), "teacher_config": {}}
        if step.teacher == FIRST:
            plans = [str(run.step(other.name).plan) for other in before]
            values |= {"learns_from": job.teacher, "lineage": plans}
        else:
            values["base_model"] = f"{job.name}-{before[-1].name}"
            values["base_note"] = ""
    return Job.from_dict(values)


@contextlib.contextmanager
def _named(step: Step) -> Iterator[None]:
    """Refusals say which step they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"step '{step.name}': {error}") from None


class Checked(NamedTuple):
    """A step's job and the remark on its derived sizes, the architectures of the model that it cuts and of its student,
    and the configs of the models before it."""

    job: Job
    remark: str
    source: Architecture
    target: Architecture
    known: Known


def checked(job: Job, folder: Path, *, offline: bool = False) -> list[Checked]:
    """Each step, checked as a job of its own.

    If a step searches, the next one starts from the shape closest to its target. Raises InputError for what could not
    run.
    """
    steps: list[Checked] = []
    known: dict[str, HfConfig] = {}
    for step, (step_job, remark) in zip(job.chain, fitted_jobs(job, folder), strict=True):
        with _named(step):
            step_job, by_models = fit_to_models(step_job, offline=offline, known=known)
            remark = "; ".join(filter(None, (remark, by_models)))
            source, target = check(step_job, offline=offline, known=known)
            config = known.get(step_job.teacher) or teacher_config(step_job, offline=offline)
            known = known | {step_job.teacher: config}
            steps.append(Checked(step_job, remark, source, target, known))
            known = known | {str(RunFolder(folder).step(step.name).student): to_hf(target, config)}
    return steps


def check_chain_space(job: Job, folder: Path) -> None:
    """Raises InputError if the disk cannot hold all steps."""
    steps = zip(job.chain, checked(job, folder), strict=True)
    need_space(folder, sum(_space_of(checked_step, folder / step.name) for step, checked_step in steps))


def _space_of(step: Checked, folder: Path) -> int:
    """Bytes that a step still needs."""
    return space_left(step.job, step.known[step.job.teacher], folder)


def describe_chain(job: Job, folder: Path) -> str:
    """The text of `--dry-run`. Raises InputError as `checked`."""
    job, remark = fit_job(job)
    steps = checked(job, folder, offline=True)
    names = [step.name for step in job.chain]
    lines = [f"{'':20}{'parameters':>16}{'tokens':>16}", f"{'teacher':20}{steps[0].source.parameters():>16,}"]
    for name, step in zip(names, steps, strict=True):
        tokens = step.job.distillation.steps * step.job.distillation.tokens_per_step
        lines.append(f"{name:20}{step.target.parameters():>16,}{tokens:>16,}")
    lines += remark_lines(remark)
    for number, (name, step) in enumerate(zip(names, steps, strict=True), 1):
        lines += ["", f"step {number} of {len(steps)}: {name}, in {folder / name}", *remark_lines(step.remark)]
        lines += lines_of(step.job, step.known)
    return "\n".join([*lines, "", *recipe_lines(job)])


def hours_of_job(job: Job, folder: Path) -> float:
    """Hours of all distillations on the GPUs of the layout (`dry_run.hours_of`). Raises InputError as `checked`."""
    if job.chain:
        return sum(hours_of(step.job, step.known) for step in checked(job, folder, offline=True))
    return hours_of(fit_to_models(job, offline=True)[0], {})


def summary(job: Job, folder: Path) -> list[JsonObject]:
    """A row for the teacher and for each student: its numbers on held-out text, before and after training. Raises
    InputError for damaged numbers of a step."""
    rows: list[JsonObject] = []
    for step in job.chain:
        file = RunFolder(folder).step(step.name).numbers
        numbers = {row["stage"]: row for row in read_numbers(file)}
        if lacking := {"teacher", "pruned", "distilled"} - numbers.keys():
            raise InputError(f"the numbers '{file}' lack those of '{min(lacking)}'; delete it and run the same again")
        if not rows:
            rows.append({"name": "teacher", **_row(numbers["teacher"])})
        student = {"name": step.name, **_row(numbers["distilled"]), "pruned": numbers["pruned"]["perplexity"]}
        rows.append(student | {"learned_from": step.teacher})
    return rows


def _row(numbers: JsonObject) -> JsonObject:
    return {name: numbers[name] for name in ("parameters", "loss", "perplexity", "corpus")}


def table(rows: list[JsonObject]) -> str:
    """The summary as text."""
    lines = [f"{'':20}{'parameters':>16}{'cut':>14}{'perplexity':>14}"]
    for row in rows:
        cut = f"{row['pruned']:,.2f}" if "pruned" in row else ""
        lines.append(f"{row['name']:20}{row['parameters']:>16,}{cut:>14}{row['perplexity']:>14,.2f}")
    return "\n".join(lines)
