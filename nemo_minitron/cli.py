"""The `minitron` command. Each function is thin: it reads options, calls a room, prints what came out."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.errors import InputError

app = typer.Typer(
    help="Makes trained language models smaller in NeMo: score, cut, distil (NVIDIA's Minitron method).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Out = Annotated[Optional[Path], typer.Option("--out", help="Where the result goes.")]
SOURCES = "Text file, JSONL, .bin/.idx prefix, or `datasets` NAME[:CONFIG][@SPLIT]"
Data = Annotated[str, typer.Option("--data", help=f"{SOURCES}; the train split unless given.")]
HeldOut = Annotated[Optional[str], typer.Option("--data", help=f"{SOURCES}; the test split unless given.")]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline stages.")]
Vp = Annotated[int, typer.Option("--vp", help="Virtual stages a pipeline stage.")]
Dp = Annotated[int, typer.Option("--dp", help="Data-parallel size.")]
Sp = Annotated[bool, typer.Option("--sp", help="Sequence parallelism within tensor-parallel groups.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32, bf16, or auto.")]
Length = Annotated[int, typer.Option("--sequence-length", help="Tokens of a sample.")]
Seed = Annotated[int, typer.Option("--seed")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; anywhere.")] = False) -> None:
    """`--debug` is read in `main`."""


@app.command()
def compress(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, e.g. distillation.tokens=2000")] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="The run folder [default: runs/NAME].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and load nothing.")] = False,
    tp: Annotated[Optional[int], typer.Option("--tp", help="Tensor-parallel size; layout.tp of the recipe.")] = None,
    dp: Annotated[Optional[int], typer.Option("--dp", help="Data-parallel size; layout.dp.")] = None,
    sp: Annotated[Optional[bool], typer.Option("--sp/--no-sp", help="Sequence parallelism; layout.sp.")] = None,
) -> None:
    """The whole job, resumable, into one run folder."""
    from nemo_minitron.job.dry_run import check, check_space, describe
    from nemo_minitron.job.find import find
    from nemo_minitron.job.precision import settled

    layout = {"tp": tp, "dp": dp, "sp": sp}
    chosen = [f"layout.{name}={str(value).lower()}" for name, value in layout.items() if value is not None]
    job = settled(find(recipe).override([*(overrides or []), *chosen]))
    if dry_run:
        print(describe(job))
        return
    folder = out or Path("runs") / job.name
    check(job)
    check_space(job, folder)
    from nemo_minitron.job.lock import locked
    from nemo_minitron.job.run import check_folder, execute, open_run
    from nemo_minitron.job.stages import stages

    check_folder(folder)
    with locked(folder):
        run = open_run(job, folder)
        execute(run, stages(job))
    run.say(f"done: {run.folder}/student is the student, {run.folder}/report.html shows it")


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out")] = Path("scores.safetensors"),
    samples: Annotated[int, typer.Option("--samples")] = 1024,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    criterion: Annotated[str, typer.Option("--criterion", help="batch,sequence: mean, l2, var or max.")] = "l2,mean",
    norms: Annotated[str, typer.Option("--norms", help="all or layers: which norms `hidden` sums.")] = "all",
    precision: Precision = "fp32",
    tp: Tp = 1,
    pp: Pp = 1,
    vp: Vp = 1,
    dp: Dp = 1,
    sp: Sp = False,
    seed: Seed = 1234,
) -> None:
    """Score what matters, with forward passes only."""
    from nemo_minitron.job import Calibration, Layout
    from nemo_minitron.job.commands import run_estimate
    from nemo_minitron.job.precision import settle

    calibration = Calibration(samples, sequence_length, batch_size, criterion, norms, settle(precision), seed)
    layout = Layout(tp=tp, pp=pp, vp=vp, dp=dp, sp=sp)
    scores = run_estimate(model, data, out, calibration, layout)
    print(f"{out}: {scores.samples} samples, {scores.tokens:,} tokens, criterion {scores.criterion}")


@app.command()
def plan(
    scores: Annotated[Path, typer.Argument(help="Scores of `minitron estimate`.")],
    keep: Annotated[str, typer.Option("--keep", help="Sizes to keep, e.g. ffn=1024,hidden=448,layers=24")],
    out: Annotated[Path, typer.Option("--out")] = Path("plan.json"),
    baseline: Annotated[str, typer.Option("--baseline", help="random or least: what the scores would not keep.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of --baseline random.")] = 0,
) -> None:
    """Choose what stays."""
    from nemo_minitron.job.commands import run_plan

    made = run_plan(scores, keep, baseline, seed)
    made.save(out)
    print(f"{out}: {made.source.parameters():,} -> {made.target.parameters():,} parameters")


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or NeMo checkpoint.")],
    plan: Annotated[Path, typer.Argument(help="A plan of `minitron plan`.")],
    out: Annotated[Path, typer.Argument(help="The student's folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Cut a model as a plan says: Hugging Face folder to folder, NeMo checkpoint to NeMo checkpoint."""
    from nemo_minitron.job.commands import run_prune

    print(f"{out}: {run_prune(model, plan, out, overwrite).parameters():,} parameters")


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="Hugging Face folder of the pruned student.")],
    teacher: Annotated[str, typer.Option("--teacher", help="Hugging Face folder, hub id or NeMo checkpoint.")],
    data: Data,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of all steps together.")],
    out: Annotated[Path, typer.Option("--out", help="The distilled Hugging Face folder.")],
    sequence_length: Length = 512,
    global_batch_size: Annotated[int, typer.Option("--global-batch-size")] = 1,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 3e-4,
    precision: Precision = "bf16",
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 100,
    tp: Tp = 1,
    dp: Dp = 1,
    sp: Sp = False,
    seed: Seed = 1234,
) -> None:
    """Retrain a student from the teacher's logits; run again after a kill, it goes on."""
    from nemo_minitron.job import Distillation, Layout
    from nemo_minitron.job.commands import run_distill
    from nemo_minitron.job.precision import settle

    settings = Distillation(
        tokens=tokens, sequence_length=sequence_length, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, min_learning_rate=learning_rate / 10,
        warmup_steps=10, precision=settle(precision), save_every=save_every, seed=seed,
    )  # fmt: skip
    run_distill(student, teacher, data, out, settings, Layout(tp=tp, dp=dp, sp=sp))
    print(f"{out}: distilled on {settings.steps * sequence_length * global_batch_size:,} tokens")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, hub id, or NeMo checkpoint (converted for the time it takes).")
    ],
    data: HeldOut = None,
    tasks: Annotated[str, typer.Option("--tasks", help="lm-eval tasks, NAME or FILE.yaml, with commas.")] = "",
    limit: Annotated[Optional[int], typer.Option("--limit", help="Documents of each task.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="At most so many tokens.")] = 16_384,
    sequence_length: Length = 512,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 4,
    precision: Precision = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and bits per byte; lm-eval tasks."""
    import json

    from nemo_minitron.job import Evaluation
    from nemo_minitron.job.commands import run_evaluate
    from nemo_minitron.job.precision import settle

    settings = Evaluation(tokens, sequence_length, batch_size, settle(precision))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    numbers = run_evaluate(model, data, settings, names, limit)
    if as_json:
        print(json.dumps(numbers))
        return
    results = numbers.pop("tasks", {})
    lines = [f"{name:14}{value}" for name, value in numbers.items()]
    lines += [f"{task}  {metric:24}{value}" for task, row in results.items() for metric, value in row.items()]
    print("\n".join(lines))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder of `minitron compress`.")]) -> None:
    """report.html, the figures, and the CSV behind each."""
    from nemo_minitron.export import write_report

    print(write_report(run))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What is installed, whether it fits together, and what to run to mend it."""
    from nemo_minitron.backend.doctor import examine

    found = examine()
    print(found.json() if as_json else found.text())
    raise typer.Exit(0 if found.ok else 1)


def main() -> None:
    """Entry point: a refusal is one sentence on stderr and exit code 2; tracebacks only with --debug.

    Ctrl-C and SIGTERM end the command and all its processes, with exit codes 130 and 143.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        _quiet()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a script's background
            signal.signal(number, _leave)
    try:
        app(arguments)
    except (InputError, OSError, RuntimeError) as error:
        if debug:
            raise
        print(f"minitron: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)


def _leave(number: int, frame: object) -> None:
    """Ends by an exception, so that what runs is ended on the way out; a second signal ends at once."""
    signal.signal(number, signal.SIG_DFL)
    print("minitron: interrupted; run the same command again and it goes on", file=sys.stderr)
    sys.exit(128 + number)


def _quiet() -> None:
    """The libraries' remarks on what is not installed are `minitron doctor`'s to tell."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("megatron", "nemo", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
