"""Folder to folder: a teacher, a plan, and the student that they make."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import atomic_folder, write_json
from nemo_minitron.errors import InputError
from nemo_minitron.families import resolve, to_hf, written_config
from nemo_minitron.families.side_files import SETTINGS, TERMS, TOKENIZER, copy_side_files
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.vocabulary import Vocabulary, write_tokenizer
from nemo_minitron.pruning.write import SHARD, write_weights
from nemo_minitron.sources.folder import HFSource
from nemo_minitron.sources.tensors import ModelSource, source_digest

PLAN, COMPENSATION = "minitron_plan.json", "minitron_compensation.json"


def prune(
    teacher: str | Path | ModelSource,
    plan: PrunePlan | str | Path,
    student: str | Path,
    *,
    compensation: Compensation | str | Path | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD,
) -> Path:
    """Cuts a Hugging Face folder (or hub id, or an opened one) as `plan` says. Returns the student's folder.

    Weights keep their dtype. The tokenizer, the generation config and the licence are copied, but no code
    (`families/side_files.py` says what, and why). The plan is saved beside them as `minitron_plan.json`. Tensors of
    `compensation` are rounded to the teacher's dtype and replace the plan's slices. A plan that cuts the vocabulary
    also cuts tokenizer.json, and renumbers tokens in the configs (`vocabulary.py`). The folder appears complete or not
    at all.

    Raises InputError for a damaged teacher, plan or compensation, and for a plan or compensation that was made for
    another model or plan; for a student's folder that is not empty (without `overwrite`) or overlaps the teacher's; for
    a link out of the teacher's folder; and for a disk that is too small or fails.
    """
    source_folder, student = teacher.folder if isinstance(teacher, ModelSource) else resolve(teacher), Path(student)
    _check_place(source_folder, student, overwrite)
    plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    source = teacher if isinstance(teacher, ModelSource) else HFSource(source_folder)
    check_plan(plan, source)
    tokenizer = (
        Vocabulary(source_folder, plan.source.vocab_size).cut(plan.keep["vocab"]) if "vocab" in plan.keep else None
    )
    config = to_hf(plan.target, source.config, plan.keep.get("layers"))
    if isinstance(compensation, (str, Path)):
        compensation = Compensation.load(compensation)
    try:
        with atomic_folder(student.resolve()) as folder, Progress("cut: MB", "MB") as progress:
            write_weights(
                source, plan, folder, config, compensation=compensation, shard_size=shard_size, threads=2,
                progress=progress,
            )  # fmt: skip
            copy_side_files(source_folder, folder, TOKENIZER, SETTINGS, TERMS)
            write_json(folder / "config.json", written_config(config))
            if tokenizer is not None:
                write_tokenizer(tokenizer, plan.keep["vocab"], folder)
            save_record(folder, plan, compensation)
    except OSError as error:
        raise InputError(f"the student '{student}' could not be written: {error}") from error
    return student


def save_record(folder: Path, plan: PrunePlan, compensation: Compensation | None = None) -> None:
    """Saves the plan, and a note of the compensation, beside the student."""
    plan.save(folder / PLAN)
    if compensation is not None:
        write_json(folder / COMPENSATION, {"tensors": sorted(compensation.shapes()), **compensation.notes})


def check_plan(plan: PrunePlan, source: ModelSource) -> None:
    """Raises InputError if `plan` was made for a model other than `source`."""
    for field in dataclasses.fields(plan.source):
        planned, actual = (getattr(a, field.name) for a in (plan.source, source.architecture))
        if planned != actual:
            raise InputError(
                f"the plan was made for another model: its {field.name} is {planned}, "
                f"that of '{source.path}' is {actual}"
            )
    if plan.model_digest is not None and plan.model_digest != source_digest(source):
        raise InputError(f"the plan was made for another model: '{source.path}' has the same sizes and other weights")


def _check_place(teacher: Path, student: Path, overwrite: bool) -> None:
    """Raises InputError for a student's folder that overlaps the teacher's, or that holds anything but a model."""
    source, target = teacher.resolve(), student.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise InputError(f"the student's folder '{student}' overlaps the teacher's '{teacher}'")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"the student's folder '{student}' is a file; choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"the student's folder '{student}' is not empty; choose another, or give --overwrite")
    if not (target / "config.json").is_file():
        raise InputError(f"'{student}' is no model folder (it has no config.json), so it is not overwritten")
