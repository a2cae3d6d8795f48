"""A job's teacher: its config, the folder from which the stages read it, and the model that is cut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, on_disk, resolve
from nemo_minitron.sources.open import config_of, is_checkpoint

if TYPE_CHECKING:
    from nemo_minitron.job.run import Run
    from nemo_minitron.settings.recipe import Job
    from nemo_minitron.sources.tensors import ModelSource


def teacher_config(job: Job, *, offline: bool = False) -> JsonObject:
    """The Hugging Face config of a job's teacher. `offline`: if the teacher is not on this machine, the config that the
    recipe states.

    Raises InputError if the teacher is no model, or has another architecture than the recipe states.
    """
    if offline and job.teacher_config and on_disk(job.teacher) is None:
        return dict(job.teacher_config)
    config = config_of((on_disk(job.teacher) if offline else None) or job.teacher)
    if job.teacher_config:
        actual, stated = from_hf(config).as_dict(), from_hf(job.teacher_config).as_dict()
        for name in stated:
            if actual.get(name) != stated[name]:
                raise InputError(
                    f"the teacher '{job.teacher}' has {name} {actual.get(name)!r}, but the recipe {job.name} is for "
                    f"one with {stated[name]!r}; give such a teacher, or write another recipe"
                )
    return config


def teacher_folder(run: Run) -> Path:
    """A run's teacher as a Hugging Face folder. A checkpoint was converted to one by the first stage."""
    path = resolve(run.job.teacher)
    return run.folder.teacher if is_checkpoint(path) else path


def uncut_folder(run: Run) -> Path:
    """The model that is scored and cut: the teacher, or the teacher in rotated coordinates."""
    return run.folder.rotated if run.job.cutting.rotate else teacher_folder(run)


def scored_model(run: Run) -> ModelSource:
    """The model that processes score: as `uncut_folder`, but a checkpoint is read as it is."""
    return run.open(run.folder.rotated if run.job.cutting.rotate else run.job.teacher)


def clear_torn(folder: Path) -> None:
    """Removes a student that has lost its config: it would not count as a model, so nothing would replace it."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)
