"""What a job would do, without loading anything: the resolved recipe, sizes, memory, stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_minitron import costs
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.files import bytes_in, need_space
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.commands.corpus import positions_of, say
from nemo_minitron.commands.plan import uncut
from nemo_minitron.commands.vocabularies import check_one_vocabulary
from nemo_minitron.errors import InputError
from nemo_minitron.evaluation.benchmarks import benchmarks, describe_benchmarks
from nemo_minitron.evaluation.tasks import check_tasks
from nemo_minitron.families import check_stage, from_hf, multiples_of, on_disk, remark_on, remarks, to_hf
from nemo_minitron.hosts import check_represented
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.compute import compute
from nemo_minitron.job.lineage import check_lineage
from nemo_minitron.job.practices import facts_of, practices
from nemo_minitron.job.scoring import describe_scoring, gigabytes
from nemo_minitron.job.stages.compensate import solved_bytes, solves
from nemo_minitron.job.stages.rounds import check_rounds, round_name, words_of_rounds
from nemo_minitron.job.stages.trajectory import check_marks, describe_marks
from nemo_minitron.job.teacher import teacher_config
from nemo_minitron.search.sizes import VOCAB, target_of
from nemo_minitron.settings.derive import fit_job, fit_job_to_models
from nemo_minitron.settings.fp8 import check_fp8, check_tokens
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Distillation, Job
from nemo_minitron.settings.search import LOSSES
from nemo_minitron.settings.written import as_yaml
from nemo_minitron.sources.open import config_of, is_checkpoint, tokenizer_folder_of

Known = Mapping[str, HfConfig]  # a model's folder -> its Hugging Face config


def searched(job: Job, source: Architecture, loads: Mapping[str, int | str]) -> Architecture:
    """The shape closest to the first target of a job that searches, of those that its layout can train. `loads`: the
    multiples that the teacher's family needs (`families.multiples_of`). Raises InputError if no shape meets the
    targets."""
    if "vocab" in job.keep:
        raise InputError(VOCAB)
    found = job.search.run(source, job.keep, loads=loads, check=lambda shape: job.layout.check_student(shape, source))
    return found.candidates[0].architecture


def _target(job: Job, source: Architecture, config: HfConfig) -> Architecture:
    """The student's Architecture; in a search the one closest to the target. `config` is the teacher's."""
    return searched(job, source, multiples_of(config)) if job.search.wanted else target_of(source, job.keep)


def learned(job: Job, source: Architecture, known: Known) -> Architecture:
    """The Architecture of the model that the student learns from; `source` is the teacher's. Raises InputError if that
    model cannot be read, or if the host cannot build it."""
    if not job.learns_from:
        return source
    config = known.get(job.learns_from) or config_of(job.learns_from)
    check_represented(config, "compress")
    return from_hf(config)


def fit_to_models(job: Job, *, offline: bool = False, known: Known | None = None) -> tuple[Job, str]:
    """(the job with the sequence lengths that its models allow, the remark). Arguments as for `check`. Raises
    InputError for a longer sequence that was asked for, and for a model that cannot be read."""
    return fit_job_to_models(job, positions_of(*_configs(job, offline=offline, known=known or {})))


def _configs(job: Job, *, offline: bool, known: Known) -> list[HfConfig]:
    """The configs of the teacher and of the model that the student learns from."""
    configs: list[HfConfig] = [known.get(job.teacher) or teacher_config(job, offline=offline)]
    if job.learns_from:
        configs.append(known.get(job.learns_from) or config_of(job.learns_from))
    return configs


def check(job: Job, *, offline: bool = False, known: Known | None = None) -> tuple[Architecture, Architecture]:
    """(teacher's, student's) Architecture. Raises InputError for anything that could not run.

    In a search the student is the shape closest to the first target. `offline`: as in `teacher_config`. `known`: the
    configs of models that a chain has yet to make.
    """
    known = known or {}
    job, _ = fit_to_models(job, offline=offline, known=known)
    config = known.get(job.teacher) or teacher_config(job, offline=offline)
    source = check_stage(config, "compress")
    ancestor = learned(job, source, known)
    target = _target(job, source, config)
    if job.search.wanted and (sentence := uncut(target, source)):
        raise InputError(sentence)
    for model in (config, to_hf(target, config)):
        check_represented(model, "compress")
    job.cutting.check(source, target, job.search.wanted)
    job.cutting.rows_of_step(job.calibration.samples, job.layout.dp)
    if job.cutting.merge_experts and not job.calibration.counts_experts:
        raise InputError(
            "merge_experts needs to know how often experts are chosen; leave calibration.method=activation, and "
            "'experts' among calibration.axes"
        )
    job.layout.check(source)
    job.layout.check_sequence(job.calibration.sequence_length)
    calibration_of(job, source)
    check_rounds(job, source, config)
    check_lineage(job, target, source, ancestor)
    if job.learns_from and on_disk(job.teacher) and on_disk(job.learns_from):
        folders = tokenizer_folder_of(job.teacher), tokenizer_folder_of(job.learns_from)
        say(check_one_vocabulary(*folders, source.vocab_size, f"'{job.learns_from}'"))
    layout, _ = job.layout.for_student(target, ancestor)
    layout.check(target, training=True)
    check_fp8(source, job.layout, job.calibration.precision)
    check_fp8(target, layout, job.distillation.precision)
    if job.distillation.learns_from_teacher:
        check_fp8(ancestor, layout, job.distillation.teacher_precision or job.distillation.precision)
    layout.check_sequence(job.distillation.sequence_length)
    check_tokens(job.calibration.sequence_length, job.calibration.batch_size, job.layout, job.calibration.precision)
    job.distillation.check_tokens(layout)
    job.distillation.check_batch(job.layout)
    job.distillation.check_states(target.num_layers, ancestor.num_layers)
    job.distillation.check_mixture(target)
    job.distillation.check_cache(target.vocab_size)
    job.generation.check(job.distillation, positions_of(*_configs(job, offline=offline, known=known)))
    check_marks(job.distillation, job.evaluation)
    tasks = (*job.evaluation.benchmarks, *job.evaluation.every_benchmarks)
    benchmarks(tasks)
    if not offline:  # lm-eval may be missing on the machine that only plans
        check_tasks(tasks)
    return source, target


def check_space(job: Job, folder: str | Path) -> None:
    """Raises InputError if the disk cannot hold the run: three students and two training checkpoints. A search
    also needs a student and a checkpoint of each candidate that is distilled, and the re-fitted matrices of each one.

    A checkpoint holds bf16 weights, their fp32 master copies and two moments. Files that exist already count as room.
    """
    need_space(folder, space_left(job, config_of(job.teacher), Path(folder)))


def space(job: Job, config: HfConfig) -> int:
    """Bytes of a run whose teacher has this config. A model that is scored between rounds uses part of them."""
    return sum(parts_of(job, config).values())


def space_left(job: Job, config: HfConfig, folder: Path) -> int:
    """Bytes that a run still needs. A finished stage needs none; the others need less if their files exist already."""
    manifest = Manifest.open(folder / RunFolder.manifest)
    done = {stage["name"] for stage in manifest.stages}
    parts = {place: size for (stage, place), size in parts_of(job, config).items() if stage not in done}
    return sum(max(0, size - bytes_in(folder / place)) for place, size in parts.items())


def parts_of(job: Job, config: HfConfig) -> dict[tuple[str, str], int]:
    """(stage, where it writes) -> bytes, for everything that is large in a run."""
    target = _target(job, from_hf(config), config)
    cuts, distilled = (job.search.candidates, job.search.distil) if job.search.wanted else (1, 0)
    if job.search.wanted and job.search.proxy == LOSSES:
        cuts += job.search.marginals * len(job.search.shapes(from_hf(config), job.keep).axes)
    trained = 2 + 2 * 14  # a new checkpoint is written before the old one is removed
    refitted = (cuts + 1) * solved_bytes(target) if solves(job) else 0  # one more: the parts of a file while it is made
    student = 2 * target.parameters()
    return {
        ("rotate", RunFolder.rotated): 2 * from_hf(config).parameters() * job.cutting.rotate,
        ("prune", RunFolder.pruned): student,
        ("prune", RunFolder.random): student,
        ("rank" if distilled else "compensate", RunFolder.search): trained * distilled * target.parameters() + refitted,
        ("distill", RunFolder.distilled): 2 * 14 * target.parameters(),
        ("export", RunFolder.student): student,
    }


def training_memory(
    student: Architecture, teacher: Architecture, settings: Distillation, layout: Layout
) -> dict[str, int]:
    """Purpose -> bytes of a distillation step, on the rank that needs most (see `costs.training_memory`)."""
    return costs.training_memory(
        student, layout, batch=settings.micro_batch_size, context=settings.sequence_length,
        precision=settings.precision, teacher_precision=settings.teacher_precision,
        teacher=teacher if settings.learns_from_teacher else None,
        micro_batches=max(1, settings.global_batch_size // (settings.micro_batch_size * layout.dp)),
    )  # fmt: skip


def describe(job: Job) -> str:
    """The text of `--dry-run`. Raises InputError as `check`."""
    fitted, by_layout = fit_job(job)
    fitted, by_models = fit_to_models(fitted, offline=True)
    remarks_on_sizes = [*remark_lines(by_layout), *remark_lines(by_models)]
    return "\n".join([*lines_of(fitted, {}), "", *remarks_on_sizes, *recipe_lines(fitted)])


def recipe_lines(job: Job) -> list[str]:
    """The settings that are not at their defaults, as YAML."""
    return [f"recipe {job.name}, without the settings that are at their defaults:", as_yaml(job).rstrip()]


def remark_lines(remark: str) -> list[str]:
    """The line that says which sizes were derived; none if every default fits."""
    return [f"remark: {remark}"] if remark else []


def lines_of(job: Job, known: Known) -> list[str]:
    """Sizes, memory, tokens and stages of a job, a line each. `known` and refusals are as in `check`."""
    source, target = check(job, offline=True, known=known)
    config = known.get(job.teacher) or teacher_config(job, offline=True)
    ancestor = learned(job, source, known)
    layout, why = job.layout.for_student(target, ancestor)
    memory = training_memory(target, ancestor, job.distillation, layout)
    lines = [f"{'':24}{'teacher':>16}{'student':>16}"]
    for field, before in source.as_dict().items():
        after = getattr(target, field)  # None: which layers stay is not known, and not all have a window
        if isinstance(before, int) and not isinstance(before, bool) and after is not None:
            lines.append(f"{field:24}{before:>16,}{after:>16,}")
    rows = {
        "parameters": lambda a: a.parameters(),
        "without embeddings": lambda a: a.parameters(embeddings=False),
        "bytes in bf16": lambda a: a.memory(batch=1, context=0),
        "FLOPs a token": lambda a: a.flops_per_token(job.distillation.sequence_length),
    }
    lines += [f"{name:24}{count(source):>16,}{count(target):>16,}" for name, count in rows.items()]
    lines += [f"remark: {sentence}" for sentence in (*remarks(config), remark_on(target, config)) if sentence]
    lines += ["", "memory of a distillation step, each rank:"]
    lines += gigabytes({**memory, "sum": sum(memory.values())})
    settings = job.distillation
    tokens = settings.steps * settings.sequence_length * settings.global_batch_size
    taught = f", the teacher in {settings.teacher_precision}" if settings.teacher_precision else ""
    trained = f"{settings.steps} steps, {tokens:,} tokens, {settings.loss}, {settings.precision}{taught}"
    lines += ["", f"distillation: {trained}"]
    lines += [f"learned from: {job.learns_from}, {ancestor.parameters():,} parameters"] if job.learns_from else []
    lines += [compute(target, ancestor, settings, job.search).describe(layout.processes)]
    lines += describe_scoring(job, source, target)
    lines += [job.generation.describe()] if job.generation.wanted else []
    lines += [describe_marks(settings, job.evaluation)] if job.evaluation.every else []
    lines += [f"calibration: {calibration_of(job, source).describe()}", f"criterion of dropped layers: {job.depth}"]
    lines += [*words_of_rounds(job, source), *([why] if why else [])]
    folder = on_disk(job.teacher) if job.teacher not in known else Path(job.teacher)
    lines += ["the teacher is not on this machine: its sizes are the recipe's"] if folder is None else []
    if job.search.wanted:
        lines += ["", f"search: {job.search.describe(source, job.keep, multiples_of(config))}"]
        lines += ["the student above is the shape closest to the first target"]
        lines += remark_lines(job.search.remark(source))
    if measured := benchmarks(job.evaluation.benchmarks):
        lines += ["", "benchmarks of teacher and student:", *(f"  {line}" for line in describe_benchmarks(measured))]
    lines += ["", "the papers' practices:", *(f"  {line}" for line in practices(facts_of(job, source, target))), ""]
    names = stage_names(job, checkpoint=folder is not None and is_checkpoint(folder))
    return [*lines, f"processes: {job.layout.processes}", "stages: " + ", ".join(names)]


def hours_of(job: Job, known: Known) -> float:
    """Hours of the distillation, and of a search, on the GPUs of the layout. `known` and refusals are as in `check`."""
    source, target = check(job, offline=True, known=known)
    flops = compute(target, learned(job, source, known), job.distillation, job.search)
    return flops.gpu_hours / job.layout.processes


def stage_names(job: Job, checkpoint: bool) -> list[str]:
    """The names of the stages, in order. `checkpoint`: whether the teacher is one of a host."""
    solving = ["compensate"] * solves(job)
    gates = ["gates"] * job.gates.run
    guessed = ["marginals"] * (job.search.proxy == LOSSES)
    searching = [*guessed, "candidates", *gates, *solving, "measure", "rank", "plan"]
    cutting = searching if job.search.wanted else ["plan", *gates, *solving]
    return [
        *["convert"] * checkpoint, "data", *["rotate"] * job.cutting.rotate, "estimate",
        *map(round_name, range(2, job.rounds + 1)), *cutting, "prune", "evaluate",
        *["generate"] * job.generation.wanted, "distill", "export", "evaluate student",
        *["benchmarks"] * bool(job.evaluation.benchmarks), "report",
    ]  # fmt: skip
