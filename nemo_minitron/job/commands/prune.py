"""A model and a plan -> the student, of the same kind."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import need_space
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, resolve
from nemo_minitron.job.launch import launch
from nemo_minitron.job.models import is_nemo


def run_prune(model: str, plan: Path, out: Path, overwrite: bool = False) -> Architecture:
    """`minitron prune`: a Hugging Face folder is cut by moving bytes; a NeMo checkpoint becomes another one.

    Gives the student's Architecture. Raises InputError.
    """
    from nemo_minitron.pruning import prune

    path = resolve(model)
    if not is_nemo(path):
        return from_hf(prune(path, plan, out, overwrite=overwrite))
    target = _check_checkpoint(path, PrunePlan.load(plan), out, overwrite)
    launch("prune", {"model": str(path), "plan": str(plan), "out": str(out)}, 1)
    return target


def _check_checkpoint(path: Path, plan: PrunePlan, out: Path, overwrite: bool) -> Architecture:
    """Everything that a cut of a NeMo checkpoint may be refused for, before NeMo is loaded."""
    from nemo_minitron.nemo.sources import open_source
    from nemo_minitron.pruning.cut import check_plan

    teacher, student = path.resolve(), out.resolve()
    if teacher == student or teacher in student.parents or student in teacher.parents:
        raise InputError(f"the student's folder '{out}' overlaps the teacher's '{path}'")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (overwrite and is_nemo(out))):
        raise InputError(f"'{out}' is there already; give a new folder, or --overwrite for a NeMo checkpoint")
    if "vocab" in plan.keep:
        raise InputError("the plan cuts the vocabulary, but the tokenizer cannot be cut yet; leave 'vocab' out")
    check_plan(plan, open_source(path))
    need_space(out, 4 * plan.target.parameters())
    return plan.target
