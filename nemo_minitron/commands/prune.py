"""A model and a plan -> the student, of the same kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan, Scores
from nemo_minitron.artifacts.files import need_space
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, resolve
from nemo_minitron.hosts import host_of
from nemo_minitron.pruning.compensation import fold_norms, head_residual
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.settings.orders import PruneOrder
from nemo_minitron.sources.open import is_nemo_checkpoint
from nemo_minitron.sources.tensors import ModelSource


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is put in place of a plan's slices: a `compensation` file, norms folded for a hidden cut, and the residual
    of pruned heads ("paper" or "laco"), which the heads' order in a file of `scores` decides."""

    compensation: Path | None = None
    fold_norms: bool = False
    head_residual: str | None = None
    scores: Path | None = None


def run_prune(
    model: str, plan: Path, out: Path, overwrite: bool = False, extras: Extras = Extras()
) -> Architecture:  # fmt: skip
    """`minitron prune`: a Hugging Face folder is cut by moving bytes; a NeMo checkpoint becomes another one.

    Gives the student's Architecture. Raises InputError.
    """
    from nemo_minitron.pruning import prune
    from nemo_minitron.sources.open import open_source

    path, made = resolve(model), PrunePlan.load(plan)
    if extras == Extras() and not is_nemo_checkpoint(path):
        return from_hf(prune(path, made, out, overwrite=overwrite))
    nemo = is_nemo_checkpoint(path)
    if nemo:
        _check_place(path, made, out, overwrite)
    source = open_source(path)
    if nemo:
        check_plan(made, source)
        need_space(out, 4 * made.target.parameters())
    compensation = compensation_of(source, made, extras)
    if not nemo:
        return from_hf(prune(source, made, out, compensation=compensation, overwrite=overwrite))
    from nemo_minitron.launch.torchrun import launch

    with apart() as scratch:
        file = scratch / "compensation.safetensors"
        if compensation is not None:
            compensation.save(file)
        launch(PruneOrder(path, plan, out, file if compensation else None), host_of().worker)
    return made.target


def compensation_of(source: ModelSource, plan: PrunePlan, extras: Extras) -> Compensation | None:
    """All that `extras` ask for, together. Raises InputError."""
    if extras == Extras():
        return None
    if (extras.head_residual is None) != (extras.scores is None):
        raise InputError("--head-residual needs --scores, and they need it: give both or neither")
    check_plan(plan, source)
    found = Compensation(plan.digest, {})
    if extras.compensation:
        found = Compensation.load(extras.compensation)
        found.check(plan)
    if extras.fold_norms:
        found = found.joined(fold_norms(source, plan), {"folded norms": True})
    if extras.head_residual and extras.scores:
        heads = Scores.load(extras.scores)["heads"]
        found = found.joined(
            head_residual(source, plan, heads, extras.head_residual), {"head residual": extras.head_residual}
        )
    return found


def _check_place(path: Path, plan: PrunePlan, out: Path, overwrite: bool) -> None:
    """What a cut of a NeMo checkpoint may be refused for before that is opened."""
    teacher, student = path.resolve(), out.resolve()
    if teacher == student or teacher in student.parents or student in teacher.parents:
        raise InputError(f"the student's folder '{out}' overlaps the teacher's '{path}'")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (overwrite and is_nemo_checkpoint(out))):
        raise InputError(f"'{out}' is there already; give a new folder, or --overwrite for a NeMo checkpoint")
    if "vocab" in plan.keep:
        raise InputError("a vocabulary is cut in Hugging Face folders alone; leave 'vocab' out for a NeMo checkpoint")
