"""`minitron evaluate`: a model -> loss, perplexity, results of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_minitron.cli.options import SOURCES, SkipBadLines
from nemo_minitron.schema import ANY_MODEL, MODEL, OUTPUT
from nemo_minitron.settings.evaluation import Evaluation

MODELS = f"{ANY_MODEL} (which is converted for the measurement)."
HELD_OUT = f"{SOURCES}. Without @SPLIT: the test split."
DRAFT_OF = "Larger model: measure how many tokens it accepts from MODEL as its draft in speculative decoding."
DRAFT_OUT = "Folder for the vLLM and TensorRT-LLM configuration of both models."


def evaluate(
    model: Annotated[str, typer.Argument(help=MODELS)],
    settings: Evaluation,
    data: Annotated[Optional[str], typer.Option("--data", help=HELD_OUT, rich_help_panel=MODEL)] = None,
    skip_bad_lines: SkipBadLines = False,
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-eval's tasks, separated by commas: NAME, FILE.yaml, or the groups base and instruct.",
            rich_help_panel=MODEL,
        ),
    ] = "",
    limit: Annotated[
        Optional[int], typer.Option(help="Number of documents of each task. Default: all.", rich_help_panel=MODEL)
    ] = None,
    draft_of: Annotated[Optional[str], typer.Option(help=DRAFT_OF, rich_help_panel=MODEL)] = None,
    draft_out: Annotated[Optional[Path], typer.Option(help=DRAFT_OUT, rich_help_panel=OUTPUT)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure loss, perplexity and bits per byte, lm-eval's tasks, and the tokens that a larger model accepts.

    minitron evaluate student --data test.jsonl

    minitron evaluate student --tasks MMLU,HellaSwag,Winogrande,GSM8K
    """
    import json

    from nemo_minitron.commands.evaluate import run_evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    numbers = run_evaluate(model, data, settings, names, limit, draft_of, draft_out, skip_bad_lines)
    if as_json:
        print(json.dumps(numbers))
        return
    results, draft = numbers.pop("tasks", {}), numbers.pop("draft", {})
    commands = draft.pop("commands", [])
    lines = [f"{name:14}{_shown(value)}" for name, value in numbers.items()]
    lines += [f"{task}  {metric:24}{_shown(value)}" for task, row in results.items() for metric, value in row.items()]
    lines += [*(f"draft  {name:12}{_shown(value)}" for name, value in draft.items()), *commands]
    print("\n".join(lines))
    print(f"written: {draft_out}" if draft_out else "nothing was written; --json > FILE keeps the numbers")


def _shown(value: object) -> object:
    """A number with six digits; --json has all of them."""
    return f"{value:.6g}" if isinstance(value, float) else value
