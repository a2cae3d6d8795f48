"""The stages of `minitron compress`: what each one reads, calls and leaves in the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.files import file_digest, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.artifacts.records import read_numbers, read_samples
from nemo_minitron.artifacts.run_folder import RunFolder, TrainingFolder
from nemo_minitron.commands.distill import export_student, left_by_training, run_training
from nemo_minitron.commands.estimate import calibrate, describe_scores
from nemo_minitron.commands.evaluate import measured
from nemo_minitron.data import Tokens
from nemo_minitron.families import resolve
from nemo_minitron.families.tokenizer import tokenizer_files
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.fitted import fitted_calibration, fitted_distillation
from nemo_minitron.job.lineage import learned_from, plan_of_learned
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.benchmark import MEASURE
from nemo_minitron.job.stages.compensate import SOLVE, compensation_of_run, solves
from nemo_minitron.job.stages.generate import WRITE, trained_on
from nemo_minitron.job.stages.rounds import cut_of, round_stages
from nemo_minitron.job.stages.search import search_stages, sizes_of, winner
from nemo_minitron.job.teacher import clear_torn, teacher_folder
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.convert import convert
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.open import is_checkpoint, open_source

LAST = f"{RunFolder.distilled}/{TrainingFolder.last}"


def stages(job: Job) -> list[Stage]:
    """The stages of a job, in order. Each names what decides its result; if that changes, or a stage before it, it is
    redone."""
    names = RunFolder
    shown = (names.numbers, names.samples)
    cuts = [names.pruned, *[names.random] * job.evaluation.random_baseline]
    nemo = is_checkpoint(resolve(job.teacher))
    converting = Stage("convert", convert_teacher, _convert_inputs, (), (_config(names.teacher),), _made(names.teacher))
    first = [converting] if nemo else []
    data = Stage("data", tokenise, _data_inputs, ("convert",) * nemo, corpora.outputs(job.data), corpora.sidecars)
    searching = search_stages(job) if job.search.wanted else []
    solving = [SOLVE] if solves(job) and not searching else []
    planned = "compensate" if solving else "plan"
    writing = [WRITE] if job.generation.wanted else []
    learned = "generate" if writing else "data"
    rounds = round_stages(job)
    scored = rounds[-1].name if rounds else "rank" if searching else "estimate"
    return [
        *first,
        data,
        Stage("estimate", estimate, _estimate_inputs, ("data",), (names.scores,)),
        *searching,
        *rounds,
        Stage("plan", plan, _plan_inputs, (scored,), (names.plan,)),
        *solving,
        Stage("prune", prune, _prune_inputs, (planned,), tuple(map(_config, cuts)), _made(*cuts)),
        Stage("evaluate", evaluate, _evaluation_inputs, ("data", "prune"), (*shown, names.windows)),
        *writing,
        Stage("distill", distill, _distill_inputs, (learned, "prune"), (LAST,), _trained),
        Stage("export", export, lambda run: None, ("distill",), (_config(names.student),), _made(names.student)),
        Stage("evaluate student", evaluate_student, _evaluation_inputs, ("evaluate", "export"), (*shown, names.speed)),
        *([MEASURE] if job.evaluation.benchmarks else []),
        Stage(
            "report",
            report,
            _report_inputs,
            ("evaluate student",),
            (names.report, names.card),
            _made(names.figures, f"{names.student}/{names.figures}"),
        ),
    ]


# -- what a stage leaves besides the files that must be there -----------------------------------------
def _config(folder: str) -> str:
    """The file without which a folder is no model."""
    return f"{folder}/config.json"


def _made(*folders: str) -> Callable[[Run], tuple[str, ...]]:
    return lambda run: folders


def _trained(run: Run) -> list[str]:
    """Of a training's folder: the last checkpoint and the records, but not the index of the samples and the logs."""
    left = left_by_training(run.folder.distilled)
    return [f"{RunFolder.distilled}/{name}" for name in left] + [RunFolder.composed]


# -- inputs: what decides a stage's result, besides the stages before it --------------------------------
def _convert_inputs(run: Run) -> object:
    return run.open(run.job.teacher).identity


def _data_inputs(run: Run) -> object:
    contents = {split: corpora.identity(source) for split, source in corpora.sources(run.job.data).items()}
    tokenizer = [file_digest(file) for file in tokenizer_files(run.open(run.job.teacher).folder)]
    return [dataclasses.asdict(run.job.data), contents, tokenizer]


def _estimate_inputs(run: Run) -> object:
    teacher = run.open(run.job.teacher)
    calibration = calibration_of(run.job, teacher.architecture)
    items = [file_digest(calibration.items)] if calibration.items else []
    return [dataclasses.asdict(calibration), teacher.identity, *items]


def _plan_inputs(run: Run) -> object:
    return [dict(run.job.keep), run.job.depth]


def _prune_inputs(run: Run) -> object:
    return [run.job.seed, run.job.evaluation.random_baseline, run.job.cutting.deciding()]


def _evaluation_inputs(run: Run) -> object:
    return dataclasses.asdict(run.job.evaluation)


def _distill_inputs(run: Run) -> object:
    cache = run.job.distillation.teacher_cache  # its content decides, not its place
    contents: JsonObject = {"teacher_cache": CacheHeader.load(cache).digest} if cache else {}
    if run.job.learns_from:
        contents["learned"] = [run.open(run.job.learns_from).identity, *map(file_digest, run.job.lineage)]
    return dataclasses.asdict(run.job.distillation) | contents


def _report_inputs(run: Run) -> object:
    return run.job.as_dict()


# -- the stages ----------------------------------------------------------------------------------------
def convert_teacher(run: Run) -> None:
    convert(resolve(run.job.teacher), run.folder.teacher)


def tokenise(run: Run) -> None:
    corpora.tokenise(run, teacher_folder(run), run.open(run.job.teacher).architecture.vocab_size)


def estimate(run: Run) -> None:
    from nemo_minitron.data import Tokens

    job, teacher, tokens = run.job, run.open(run.job.teacher), Tokens(corpora.prefix(run, "calibration"))
    fit = fitted_calibration(job, teacher.architecture, tokens)
    if fit.remark:  # it also holds for later stages that read this text, which do not repeat it
        run.say(f"    remark: {fit.remark}")
    scores = calibrate(teacher, tokens, run.folder.calibration, fit.settings, job.layout, run.folder.log)
    scores.save(run.folder.scores)
    run.say(f"    {scores.samples} samples, {scores.tokens:,} tokens, criterion {scores.criterion}")
    for line in describe_scores(scores):
        run.say(f"    {line}")


def plan(run: Run) -> None:
    from nemo_minitron.search import threshold_band

    first = Scores.load(run.folder.scores)
    if run.job.search.wanted:
        final = last = PrunePlan.load(winner(run).plan)
        scores = first
    else:
        final, last, scores = cut_of(run, run.job.rounds)
    final.save(run.folder.plan)
    run.manifest.digests |= {"scores": first.digest, "plan": final.digest, "model": first.model_digest or ""}
    run.say(f"    {final.source.parameters():,} -> {final.target.parameters():,} parameters")
    close = threshold_band(scores, last, 1e-5)
    run.say("    units within 1e-5 of their threshold: " + ", ".join(f"{n} of {a}" for a, n in close.items()))


def prune(run: Run) -> None:
    from nemo_minitron.pruning import prune as cut
    from nemo_minitron.search import random_plan

    teacher, plan = run.open(teacher_folder(run)), PrunePlan.load(run.folder.plan)
    # A search has re-fitted the matrices of each candidate; they lie in the candidate's own folder.
    cut_folder = winner(run) if run.job.search.wanted else run.folder
    compensation = compensation_of_run(run, teacher, cut_folder)
    for torn in (run.folder.pruned, run.folder.random):
        clear_torn(torn)
    cut(teacher, plan, run.folder.pruned, compensation=compensation, overwrite=True)
    if run.job.evaluation.random_baseline:
        at_random = random_plan(plan.source, keep={**sizes_of(plan), **run.job.keep}, seed=run.job.seed)
        cut(teacher, at_random, run.folder.random, overwrite=True)


def evaluate(run: Run) -> None:
    models = {"teacher": teacher_folder(run), "random": run.folder.random, "pruned": run.folder.pruned}
    if not run.job.evaluation.random_baseline:
        del models["random"]
    numbers = [_measure(run, stage, folder) for stage, folder in models.items()]
    write_json(run.folder.numbers, numbers)
    samples = [text for stage in ("teacher", "pruned") for text in _continue(run, stage, models[stage])]
    write_json(run.folder.samples, samples)


def distill(run: Run) -> None:
    job, train = run.job, trained_on(run)
    student, learned = open_source(run.folder.pruned), run.open(learned_from(job))
    layout, why = job.layout.for_student(student.architecture, learned.architecture)
    if why:
        run.say(f"    {why}")
    held_out = corpora.prefix(run, "test") if job.distillation.validate_every else train
    fit = fitted_distillation(job, layout, Tokens(train), Tokens(held_out))
    if fit.remark:
        run.say(f"    remark: {fit.remark}")
    run_training(
        student, learned, (train, held_out), run.folder.distilled, fit.settings, layout,
        run.folder.log, plan=plan_of_learned(job, run.folder),
    )  # fmt: skip


def export(run: Run) -> None:
    export_student(run.folder.distilled, open_source(run.folder.pruned), run.folder.student)


def evaluate_student(run: Run) -> None:
    student = run.folder.student
    numbers = [row for row in read_numbers(run.folder.numbers) if row["stage"] != "distilled"]
    write_json(run.folder.numbers, [*numbers, _measure(run, "distilled", student)])
    samples = [row for row in read_samples(run.folder.samples) if row["stage"] != "distilled"]
    write_json(run.folder.samples, [*samples, *_continue(run, "distilled", student)])
    write_json(run.folder.speed, _speeds(run, {"teacher": teacher_folder(run), "distilled": student}))


def report(run: Run) -> None:
    from nemo_minitron.export import write_card, write_report
    from nemo_minitron.job.stages.facts import card_facts

    write_card(run.folder.student, card_facts(run))
    run.say(f"    {write_report(run.folder.path)}")


def _measure(run: Run, stage: str, folder: Path) -> JsonObject:
    from nemo_minitron.data import Tokens
    from nemo_minitron.evaluation import Windows

    held_out = Tokens(corpora.prefix(run, "test"))
    numbers = measured(folder, held_out, run.job.evaluation, lambda line: run.say(f"    {line}"))
    assert numbers.windows is not None  # `evaluate` always gives them
    row = numbers.as_dict() | {"stage": stage, "corpus": run.job.data.name}
    if stage == "teacher":
        numbers.windows.save(run.folder.windows)
    else:
        row |= numbers.windows.beside(Windows.load(run.folder.windows))
    run.say(f"    {stage:10} {row['parameters']:>13,} parameters  perplexity {row['perplexity']:,.2f}")
    return row


def _speeds(run: Run, models: dict[str, Path]) -> dict[str, JsonObject]:
    from nemo_minitron.evaluation import speeds

    found = speeds(models, precision=run.job.evaluation.precision)
    for name, took in found.items():
        rate = f"{took['tokens_per_second']:,.1f} tokens/s"
        run.say(f"    {name:10} {took['latency']:.3f} s to the first token, then {rate}")
    return found


def _continue(run: Run, stage: str, folder: Path) -> list[dict[str, str]]:
    from nemo_minitron.evaluation import generate

    settings = run.job.evaluation
    prompts = list(settings.prompts)
    if not prompts:
        return []
    progress = Progress("generate: prompt", "tokens", settings.new_tokens, lambda line: run.say(f"    {line}"))
    texts = generate(
        folder, prompts, max_new_tokens=settings.new_tokens, precision=settings.precision, progress=progress
    )
    return [{"stage": stage, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
