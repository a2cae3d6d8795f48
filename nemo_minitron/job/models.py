"""A job's teacher wherever it lies: a Hugging Face folder as it is, a NeMo checkpoint turned into one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder, write_json
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, on_disk, read_config, resolve, written_config

if TYPE_CHECKING:
    from nemo_minitron.job.run import Run
    from nemo_minitron.job.settings.recipe import Job

TEACHER = "checkpoints/teacher"  # of a run: what its first stage made of a NeMo checkpoint
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by safetensors' names


def is_nemo(model: str | Path) -> bool:
    """Whether `model` is a NeMo checkpoint's folder."""
    from nemo_minitron.nemo.sources import is_nemo_checkpoint

    return is_nemo_checkpoint(model)


def config_of(model: str | Path) -> dict[str, Any]:
    """The Hugging Face config of a model; a NeMo checkpoint's from its context, read as data, without NeMo.

    Raises InputError for what is no model.
    """
    path = resolve(model)
    if not is_nemo(path):
        return read_config(path)
    from nemo_minitron.nemo.context import hf_config

    config = hf_config(path)
    if config["vocab_size"] is None:  # NeMo took it from the tokenizer; the weights have it
        from nemo_minitron.nemo.checkpoint import CheckpointSource

        return CheckpointSource(path).config
    return config


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
    return run.path(TEACHER) if is_nemo(path) else path


@contextlib.contextmanager
def as_folder(model: str | Path) -> Iterator[Path]:
    """A Hugging Face folder of `model`: itself, or what a NeMo checkpoint becomes for as long as the block."""
    path = resolve(model)
    if not is_nemo(path):
        yield path
        return
    with apart() as scratch:
        yield convert(path, scratch / path.name)


def convert(checkpoint: Path, out: Path) -> Path:
    """A NeMo checkpoint -> a Hugging Face folder with its tokenizer; weights keep their dtype.

    Raises InputError for a damaged checkpoint, one without its tokenizer, or too small a disk.
    """
    from nemo_minitron.families.side_files import TOKENIZER, copy_side_files
    from nemo_minitron.nemo.checkpoint import CheckpointSource
    from nemo_minitron.nemo.data import load_tokenizer
    from nemo_minitron.pruning.write import write_weights

    source = CheckpointSource(checkpoint)
    tokenizer = load_tokenizer(source.folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    dtype = TORCH_NAMES[source.dtype(next(iter(source.architecture.shapes())))]
    with atomic_folder(out) as folder:
        write_weights(source, identity(source.architecture), folder, source.config)
        write_json(folder / "config.json", written_config(source.config | ends | {"torch_dtype": dtype}))
        copy_side_files(source.folder, folder, TOKENIZER)
    return out


def clear_torn(folder: Path) -> None:
    """Removes a student of a run that has lost its config: it would not be taken for a model, and so not replaced."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)


def identity(architecture: Any) -> PrunePlan:
    """The plan that cuts nothing."""
    return PrunePlan(source=architecture, target=architecture, keep={})
