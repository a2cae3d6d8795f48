"""A student and its teacher -> the distilled student."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_folder, digest_of, write_json
from nemo_minitron.errors import InputError
from nemo_minitron.families import resolve
from nemo_minitron.job.commands.corpus import cache_of, corpus_identity, tokenise
from nemo_minitron.job.launch import launch
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.lock import locked
from nemo_minitron.job.models import identity
from nemo_minitron.job.recipe import Distillation


def run_training(
    student: Path, teacher: str, prefixes: tuple[Path, Path], out: Path, recipe: Distillation, layout: Layout,
    log: Path | None = None, stop: int | None = None,
) -> None:  # fmt: skip
    """Distils into `out` (a NeMo run with `last.json` and `loss.csv`); a run of other settings is begun anew.

    `stop`: the step after which it ends for now, one that is saved; called again with a later one, it goes on.
    """
    models = [teacher_identity(str(student)), teacher_identity(teacher)]
    identity = digest_of([dataclasses.asdict(recipe), models, corpus_identity(prefixes[0])])
    mark = out / "settings.json"
    if out.exists() and not (mark.is_file() and json.loads(mark.read_text()) == identity):
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)
    if _finished(out, stop or recipe.steps):
        return
    settings = {
        "student": str(student), "teacher": str(teacher), "train": str(prefixes[0]), "validation": str(prefixes[1]),
        "out": str(out), "index": str(out / "index"), "distillation": dataclasses.asdict(recipe),
        "layout": dataclasses.asdict(layout), "stop": stop,
    }  # fmt: skip
    launch("distill", settings, layout.processes, log)


def _finished(out: Path, steps: int) -> bool:
    """Whether a checkpoint of so many steps is whole; what a kill left half-saved is cleared for the next try."""
    folder = out / "nemo" / "checkpoints"
    for marker in folder.glob("*-unfinished"):  # NeMo refuses to resume beside one
        shutil.rmtree(folder / marker.name.removesuffix("-unfinished"), ignore_errors=True)
        marker.unlink()
    saved = {int(path.name.split("=")[1].removesuffix("-last")) + 1: path for path in folder.glob("step=*-last")}
    last = max(saved, default=0)  # NeMo counts steps from 0
    if last < steps:
        return False
    write_json(out / "last.json", {"checkpoint": str(saved[last].relative_to(out))})
    return True


def run_distill(student: str, teacher: str, data: str, out: Path, recipe: Distillation, layout: Layout) -> Path:
    """`minitron distill`: a Hugging Face folder in, a distilled one out, `loss.csv` beside its files."""
    from nemo_minitron.nemo.sources import open_source
    from nemo_minitron.pruning import HFSource

    source, teacher_folder = resolve(student), resolve(teacher)
    _check_out(out, (source, teacher_folder))
    layout.check(HFSource(source).architecture)
    layout.check(open_source(teacher_folder).architecture)
    layout.check_sequence(recipe.sequence_length)
    work = cache_of(out)
    with locked(work):
        tokens = tokenise(data, source, work / "train")
        training = work / "training"
        prefixes = (tokens.prefix, tokens.prefix)
        run_training(source, str(teacher_folder), prefixes, training, recipe, layout, work / "log.txt")
        return export_student(training, source, out)


def _check_out(out: Path, inputs: tuple[Path, ...]) -> None:
    """A folder that somebody else made is never replaced. Raises InputError."""
    if any(out.resolve() == path.resolve() for path in inputs):
        raise InputError(f"'{out}' is also the student or the teacher; give another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / "loss.csv").is_file():
        raise InputError(f"'{out}' is not empty and holds no distilled student; give a new folder with --out")
    if out.is_file():
        raise InputError(f"'{out}' is a file; give a new folder with --out")


def export_student(training: Path, base: Path, out: Path) -> Path:
    """The last checkpoint of a training -> a Hugging Face folder like `base`, with the new weights.

    Weights keep the dtype that `base` stores, so that the folder is what its config says.
    """
    from nemo_minitron.export import finish_folder
    from nemo_minitron.nemo.checkpoint import CheckpointSource, last_checkpoint
    from nemo_minitron.nemo.convert import Converted
    from nemo_minitron.pruning.folder import HFSource
    from nemo_minitron.pruning.write import write_weights

    stored = HFSource(base)
    source = Converted(CheckpointSource(last_checkpoint(training)), stored)
    with atomic_folder(out) as folder:
        for file in sorted(base.iterdir()):
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json", "README.md")):
                shutil.copy2(file, folder / file.name)
        write_weights(source, identity(stored.architecture), folder, stored.config)
        finish_folder(folder, base_folder=base)
        if (training / "loss.csv").exists():
            shutil.copy2(training / "loss.csv", folder / "loss.csv")
    return out


def teacher_identity(teacher: str) -> list[str]:
    """The model digest of a model on disk, and its config's: an edited rope_theta is another model."""
    from nemo_minitron.nemo.sources import open_source
    from nemo_minitron.pruning.tensors import source_digest

    source = open_source(teacher)
    return [source_digest(source), digest_of(dict(source.config))]
