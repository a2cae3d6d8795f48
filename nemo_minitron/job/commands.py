"""What the commands and the stages of a job do: each reads files, calls one room and leaves files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.files import atomic_folder, digest_of, need_space, write_json
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf, resolve
from nemo_minitron.job.launch import launch
from nemo_minitron.job.layout import Layout
from nemo_minitron.job.lock import locked
from nemo_minitron.job.models import as_folder, identity, is_nemo
from nemo_minitron.job.recipe import Calibration, Distillation, Evaluation


def sizes(text: str) -> dict[str, int]:
    """`ffn=1024,layers=24` -> sizes by axis. Raises InputError."""
    found = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value.strip().isdigit():
            raise InputError(f"'{part}' in --keep is no size; write axis=size, for example ffn=1024,layers=24")
        found[name.strip()] = int(value)
    return found


def run_plan(scores: Path, keep: str, baseline: str = "", seed: int = 0) -> PrunePlan:
    """A plan of scores, or a baseline for it: `random` (seeded) or `least` important. Raises InputError."""
    from nemo_minitron.search import plan, random_plan

    known = Scores.load(scores)
    if baseline not in ("", "random", "least"):
        raise InputError(f"baseline '{baseline}' is unknown; legal are random and least")
    if baseline == "random":
        return random_plan(known.architecture, keep=sizes(keep), seed=seed)
    return plan(known, keep=sizes(keep), least=baseline == "least")


def tokenise(data: str, model: str | Path, prefix: Path) -> Any:
    """Text -> `.bin/.idx` with the model's tokenizer, once; gives the Tokens."""
    from nemo_minitron.nemo.data import build, load_tokenizer

    return build(data, load_tokenizer(model), prefix)


def cache_of(out: Path) -> Path:
    """Where a command keeps its tokens and sample index: beside its result, named so that it is not read as one."""
    return out.parent / f".{out.name}.work"


def run_estimate(
    model: str, data: str, out: Path, calibration: Calibration, layout: Layout, log: Path | None = None
) -> Scores:
    """Scores of a model into `out`, in the processes of the layout. Raises InputError."""
    from nemo_minitron.nemo.sources import open_source

    source = open_source(model)
    layout.check(source.architecture)
    layout.check_sequence(calibration.sequence_length)
    work = cache_of(out)
    tokens = tokenise(data, source.folder, work / "calibration")
    settings = {
        "model": str(resolve(model)), "data": str(tokens.prefix), "out": str(out), "index": str(work / "index"),
        "calibration": dataclasses.asdict(calibration), "layout": dataclasses.asdict(layout),
    }  # fmt: skip
    launch("estimate", settings, layout.processes, log)
    return Scores.load(out)


def run_training(
    student: Path, teacher: str, prefixes: tuple[Path, Path], out: Path, recipe: Distillation, layout: Layout,
    log: Path | None = None,
) -> None:  # fmt: skip
    """Distils into `out` (a NeMo run with `last.json` and `loss.csv`); a run of other settings is begun anew."""
    models = [teacher_identity(str(student)), teacher_identity(teacher)]
    identity = digest_of([dataclasses.asdict(recipe), models, corpus_identity(prefixes[0])])
    mark = out / "settings.json"
    if out.exists() and not (mark.is_file() and json.loads(mark.read_text()) == identity):
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)
    if _finished(out, recipe):
        return
    settings = {
        "student": str(student), "teacher": str(teacher), "train": str(prefixes[0]), "validation": str(prefixes[1]),
        "out": str(out), "index": str(out / "index"), "distillation": dataclasses.asdict(recipe),
        "layout": dataclasses.asdict(layout),
    }  # fmt: skip
    launch("distill", settings, layout.processes, log)


def _finished(out: Path, recipe: Distillation) -> bool:
    """Whether the last step's checkpoint is whole; what a kill left half-saved is cleared for the next try."""
    folder = out / "nemo" / "checkpoints"
    for marker in folder.glob("*-unfinished"):  # NeMo refuses to resume beside one
        shutil.rmtree(folder / marker.name.removesuffix("-unfinished"), ignore_errors=True)
        marker.unlink()
    last = folder / f"step={recipe.steps - 1}-last"  # NeMo counts steps from 0
    if last.is_dir() and not (out / "last.json").exists():
        write_json(out / "last.json", {"checkpoint": str(last.relative_to(out))})
    return last.is_dir()


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


def corpus_identity(prefix: Path) -> str:
    """What a corpus of tokens holds: its content's digest, or size and time where it came ready-made."""
    from nemo_minitron.nemo.data import Tokens

    corpus = Tokens(prefix).corpus
    state = prefix.with_name(prefix.name + ".bin").stat()
    return corpus.content if corpus else f"{state.st_size} {state.st_mtime_ns}"


def run_evaluate(
    model: str, data: str | None, settings: Evaluation, tasks: Sequence[str] = (), limit: int | None = None
) -> dict[str, Any]:
    """`minitron evaluate`: numbers on held-out text, and lm-eval's under `tasks`; either may be left out.

    A NeMo checkpoint becomes a Hugging Face folder for as long as it takes. Raises InputError.
    """
    from nemo_minitron.evaluation import check_tasks, run_tasks
    from nemo_minitron.nemo.data import held_out

    if data is None and not tasks:
        raise InputError("there is nothing to measure; give --data, --tasks or both")
    check_tasks(tasks)
    numbers: dict[str, Any] = {}
    with as_folder(model) as folder, tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        if data is not None:
            tokens = tokenise(held_out(data), folder, Path(scratch) / "corpus")
            numbers = measure(folder, tokens, settings) | {"corpus": held_out(data)}
        if tasks:
            numbers["tasks"] = run_tasks(
                folder, tasks, precision=settings.precision, batch_size=settings.batch_size, limit=limit
            )
    return numbers


def measure(folder: Path, tokens: Any, settings: Evaluation) -> dict[str, Any]:
    """Numbers of a Hugging Face folder on the first windows of a corpus of its tokenizer's tokens."""
    from nemo_minitron.evaluation import evaluate
    from nemo_minitron.nemo.data import load_tokenizer, token_bytes

    from_hf(folder)
    count = max(1, min(settings.tokens // settings.sequence_length, tokens.samples(settings.sequence_length)))
    windows = tokens.windows(settings.sequence_length, count)
    lengths = token_bytes(load_tokenizer(folder))
    return evaluate(
        folder, windows, token_bytes=lengths, precision=settings.precision, batch_size=settings.batch_size
    ).as_dict()
