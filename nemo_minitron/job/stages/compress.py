"""The stages of `minitron compress`: what each one reads, calls and leaves in the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.files import file_digest, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.records import read_numbers, read_samples
from nemo_minitron.artifacts.run_folder import CutFolder, RunFolder
from nemo_minitron.commands.distill import export_student
from nemo_minitron.commands.estimate import calibrate, describe_scores
from nemo_minitron.commands.evaluate import measured
from nemo_minitron.data import Tokens
from nemo_minitron.families import resolve
from nemo_minitron.families.tokenizer import tokenizer_files
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.fitted import fitted_calibration
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.benchmark import MEASURE
from nemo_minitron.job.stages.compensate import SOLVE, compensation_of_run, sliced, solves, unscaled
from nemo_minitron.job.stages.distill import distill_stage
from nemo_minitron.job.stages.gates import gate_stage
from nemo_minitron.job.stages.generate import WRITE
from nemo_minitron.job.stages.rotate import ROTATE
from nemo_minitron.job.stages.rounds import cut_of, round_stages
from nemo_minitron.job.stages.search import as_large_as, search_stages, winner
from nemo_minitron.job.teacher import clear_torn, scored_model, teacher_folder, uncut_folder
from nemo_minitron.pruning.convert import convert
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.open import is_checkpoint, open_source

MEASURED = ("teacher", "random", "sliced", "pruned")  # the teacher first: the others are compared with its windows


def stages(job: Job) -> list[Stage]:
    """The stages of a job, in order. Each names what decides its result; if that changes, or a stage before it, it is
    redone."""
    names = RunFolder
    shown = (names.numbers, names.samples)
    cuts = [names.pruned, *[names.random] * job.evaluation.random_baseline]
    checkpoint = is_checkpoint(resolve(job.teacher))
    converting = Stage("convert", convert_teacher, _convert_inputs, (), (_config(names.teacher),), _made(names.teacher))
    first = [converting] if checkpoint else []
    rotating = [ROTATE] if job.cutting.rotate else []
    data = Stage("data", tokenise, _data_inputs, ("convert",) * checkpoint, corpora.outputs(job.data), corpora.sidecars)
    choosing, trying = search_stages(job) if job.search.wanted else ([], [])
    solving = [SOLVE] if solves(job) and not choosing else []
    planned = "compensate" if solving else "plan"
    writing = [WRITE] if job.generation.wanted else []
    learned = "generate" if writing else "data"
    rounds = round_stages(job)
    checking = [gate_stage(job)] if job.gates.run else []
    scored = rounds[-1].name if rounds else "rank" if choosing else "estimate"
    return [
        *first,
        data,
        *rotating,
        Stage("estimate", estimate, _estimate_inputs, ("rotate" if rotating else "data",), (names.scores,)),
        *choosing,
        *(checking if choosing else []),
        *trying,
        *rounds,
        Stage("plan", plan, _plan_inputs, (scored,), (names.plan,)),
        *([] if choosing else checking),
        *solving,
        Stage("prune", prune, _prune_inputs, (planned,), tuple(map(_config, cuts)), _made(*cuts)),
        Stage("evaluate", evaluate, _evaluation_inputs, ("data", "prune"), (*shown, names.windows)),
        *writing,
        distill_stage((learned, "prune")),
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
    return run.job.evaluation.deciding()


def _report_inputs(run: Run) -> object:
    return run.job.as_dict()


# -- the stages ----------------------------------------------------------------------------------------
def convert_teacher(run: Run) -> None:
    convert(resolve(run.job.teacher), run.folder.teacher)


def tokenise(run: Run) -> None:
    corpora.tokenise(run, teacher_folder(run), run.open(run.job.teacher).architecture.vocab_size)


def estimate(run: Run) -> None:
    job, model, tokens = run.job, scored_model(run), Tokens(corpora.prefix(run, "calibration"))
    fit = fitted_calibration(job, model.architecture, tokens)
    if fit.remark:  # it also holds for later stages that read this text, which do not repeat it
        run.say(f"    remark: {fit.remark}")
    scores = calibrate(model, tokens, run.folder.calibration, fit.settings, job.layout, run.folder.log)
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

    uncut, plan = run.open(uncut_folder(run)), PrunePlan.load(run.folder.plan)
    if why := unscaled(run.job, plan):
        run.say(f"    remark: {why}")
    compensation = compensation_of_run(run, uncut, _cut_folder(run))
    for torn in (run.folder.pruned, run.folder.random):
        clear_torn(torn)
    cut(uncut, plan, run.folder.pruned, compensation=compensation, overwrite=True)
    if run.job.evaluation.random_baseline:
        at_random = random_plan(plan.source, keep=as_large_as(plan, run.job.keep), seed=run.job.seed)
        cut(uncut, at_random, run.folder.random, overwrite=True)


def _cut_folder(run: Run) -> CutFolder:
    """Where the plan and its re-fitted matrices lie. A search has re-fitted those of each candidate, in its folder."""
    return winner(run) if run.job.search.wanted else run.folder


def evaluate(run: Run) -> None:
    models = {"teacher": teacher_folder(run), "random": run.folder.random, "pruned": run.folder.pruned}
    if not run.job.evaluation.random_baseline:
        del models["random"]
    with sliced(run, run.open(uncut_folder(run)), _cut_folder(run)) as plain:
        if plain:
            models["sliced"] = plain
        numbers = [_measure(run, stage, models[stage]) for stage in MEASURED if stage in models]
    write_json(run.folder.numbers, numbers)
    samples = [text for stage in ("teacher", "pruned") for text in _continue(run, stage, models[stage])]
    write_json(run.folder.samples, samples)


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
    from nemo_minitron.evaluation import Windows

    held_out = Tokens(corpora.prefix(run, "test"))
    numbers = measured(folder, held_out, run.job.evaluation, run.progress)
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
    with run.progress("generate: prompt", "tokens", settings.new_tokens) as progress:
        texts = generate(
            folder, prompts, max_new_tokens=settings.new_tokens, precision=settings.precision, progress=progress
        )
    return [{"stage": stage, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
