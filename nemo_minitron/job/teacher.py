"""A job's teacher: its config, and the folder that the stages read it from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, on_disk, resolve
from nemo_minitron.sources.open import config_of, is_nemo_checkpoint

if TYPE_CHECKING:
    from nemo_minitron.job.run import Run
    from nemo_minitron.settings.recipe import Job


def teacher_config(job: Job, *, offline: bool = False) -> dict[str, Any]:
    """The config of a job's teacher; `offline`: of one that is not on this machine, what the recipe states.

    Raises InputError for what is no model, and for another architecture than the recipe states.
    """
    if offline and job.teacher_config and on_disk(job.teacher) is None:
        return dict(job.teacher_config)
    config = config_of((on_disk(job.teacher) if offline else None) or job.teacher)
    if job.teacher_config:
        found, stated = from_hf(config).as_dict(), from_hf(job.teacher_config).as_dict()
        for name in stated:
            if found.get(name) != stated[name]:
                raise InputError(
                    f"the teacher '{job.teacher}' has {name} {found.get(name)!r} and the recipe {job.name} is for one "
                    f"with {stated[name]!r}; give such a teacher, or write another recipe"
                )
    return config


def teacher_folder(run: Run) -> Path:
    """A run's teacher as a Hugging Face folder: itself, or what the first stage made of a NeMo checkpoint."""
    path = resolve(run.job.teacher)
    return run.folder.teacher if is_nemo_checkpoint(path) else path


def clear_torn(folder: Path) -> None:
    """Removes a student of a run that has lost its config: it would not be taken for a model, and so not replaced."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)
